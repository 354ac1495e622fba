"""The trainer is read top to bottom, imports nothing of ours, and stands few calls away from its attention."""

from __future__ import annotations

import ast

from conftest import TRAINER

TREE = ast.parse(TRAINER.read_text(encoding="utf-8"))
DEFINITIONS = [node for node in TREE.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def test_every_function_class_and_constant_stands_above_whatever_uses_it():
    line_of = {node.name: node.lineno for node in DEFINITIONS}
    line_of |= {target.id: node.lineno for node in TREE.body if isinstance(node, ast.Assign)
                for target in node.targets if isinstance(target, ast.Name)}
    below = {f"{node.name} uses {name.id}" for node in DEFINITIONS for name in ast.walk(node)
             if isinstance(name, ast.Name) and line_of.get(name.id, 0) > node.lineno}
    assert not below


def test_functions_can_be_held_in_the_head():
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    assert not {node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 60}


def test_the_trainer_imports_nothing_of_ours():
    modules = {name.name for node in ast.walk(TREE) if isinstance(node, ast.Import) for name in node.names}
    modules |= {node.module or "" for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)}
    assert not {module for module in modules if module.split(".")[0] in ("tools", "webui", "trainers", "benchmarks")}


def test_at_most_eight_functions_stand_between_main_and_attention():
    chain = ("run_training", "train", "train_step", "backward", "token_losses", "UnifiedVoiceGPT", "Block",
             "CausalSelfAttention")
    calls = {node.name: {name.id for name in ast.walk(node) if isinstance(name, ast.Name)} for node in DEFINITIONS}
    assert chain[0] in calls["main"]
    for caller, callee in zip(chain[:4], chain[1:5], strict=True):
        assert callee in calls[caller]


def test_broad_excepts_stand_at_the_two_readers_of_damaged_files_only():
    found = {}
    for node in DEFINITIONS:
        handlers = [h for h in ast.walk(node) if isinstance(h, ast.ExceptHandler)]
        for handler in handlers:
            if handler.type is None or (isinstance(handler.type, ast.Name) and handler.type.id == "Exception"):
                found[node.name] = found.get(node.name, 0) + 1
    assert found == {"ArrayFile": 1, "read_torch_file": 1}
