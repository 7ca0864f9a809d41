"""The list of mutations keeps up with the code; ``run.py`` runs them."""

from __future__ import annotations

import ast

import pytest
from run import ROOT, Mutation, read_mutations

MUTATIONS = read_mutations()


def test_there_are_enough_of_them() -> None:
    assert len({(mutation.file, mutation.old, mutation.new) for mutation in MUTATIONS}) >= 24


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.promise)
def test_what_a_mutation_changes_is_there_once_and_still_parses(mutation: Mutation) -> None:
    source = (ROOT / mutation.file).read_text()
    assert source.count(mutation.old) == 1
    ast.parse(source.replace(mutation.old, mutation.new))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.promise)
def test_the_tests_that_a_mutation_names_exist(mutation: Mutation) -> None:
    for node in mutation.tests:
        file, *names = node.split("[")[0].split("::")
        defined = {
            item.name
            for item in ast.walk(ast.parse((ROOT / file).read_text()))
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        }
        assert set(names) <= defined
