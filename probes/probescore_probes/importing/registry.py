"""Lists the formats of other libraries' probes that can be imported, in the order in which they are tried on a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from probescore_probes.importing.attention_probes import is_attention_probe, read_attention_probe
from probescore_probes.importing.directions import is_direction, is_hidden_states_direction, read_direction, read_hidden_states_direction
from probescore_probes.importing.estimators import is_estimator, read_estimator
from probescore_probes.importing.graphs import is_graph, read_graph
from probescore_probes.importing.hallucination_probes import is_hallucination_probe, read_hallucination_probe
from probescore_probes.importing.imported import Imported, ImportOptions
from probescore_probes.importing.lie_detectors import is_lie_detector, read_lie_detector
from probescore_probes.importing.obfuscation_atlas import is_obfuscation_atlas, read_obfuscation_atlas
from probescore_probes.importing.rl_rewardhacking import is_rl_rewardhacking, read_rl_rewardhacking
from probescore_probes.importing.sae_lens import is_sae, read_sae
from probescore_probes.importing.sing_probe import is_sing_probe, read_sing_probe
from probescore_probes.importing.source import ProbeSource
from probescore_probes.importing.standardised import is_standardised, read_standardised, read_vllm_lens


@dataclass(frozen=True)
class Format:
    """The format in which one library saves probes: how to recognise and how to read its files.

    Attributes:
        name: the name by which an importer asks for the format.
        recognises: returns whether a file's content is certainly of this format.
        read: makes a probe of a file; raises ``ValueError`` that says what is wrong and what to do.
        brings_adapter: whether a LoRA adapter beside the probe's files is part of the probe, which reads the model with it.
    """

    name: str
    recognises: Callable[[ProbeSource], bool]
    read: Callable[[ProbeSource, ImportOptions], Imported]
    brings_adapter: bool = False


FORMATS = (
    Format("hallucination-probes", is_hallucination_probe, read_hallucination_probe, brings_adapter=True),
    Format("saelens", is_sae, read_sae),
    Format("obfuscation-atlas", is_obfuscation_atlas, read_obfuscation_atlas),
    Format("singprobe", is_sing_probe, read_sing_probe),
    Format("lie-detectors", is_lie_detector, read_lie_detector),
    Format("rl-rewardhacking", is_rl_rewardhacking, read_rl_rewardhacking),
    Format("attention-probes", is_attention_probe, read_attention_probe),
    Format("standardised", is_standardised, read_standardised),
    Format("vllm-lens", lambda _: False, read_vllm_lens),  # what it saves is standardised, and does not say where it comes from
    Format("sklearn", is_estimator, read_estimator),
    Format("onnx", is_graph, read_graph),
    Format("direction", is_direction, read_direction),
    Format("hf-directions", is_hidden_states_direction, read_hidden_states_direction),
)


def format_of(source: ProbeSource, name: str | None) -> Format:
    """Returns the format in which another library saved a probe's file: the format that the user named, or the one that the file's content
    shows.

    Raises:
        ValueError: there is no format of this name, or no format recognises the file.
    """
    names = ", ".join(known.name for known in FORMATS)
    if name is not None:
        for known in FORMATS:
            if known.name == name:
                return known
        raise ValueError(f"format: {name!r}; give one of {names}")
    for known in FORMATS:
        if known.recognises(source):
            return known
    raise ValueError(f"format: {source.name} is not recognised by what is in it; give one of {names}")
