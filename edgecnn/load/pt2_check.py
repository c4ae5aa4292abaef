"""Check a .pt2 archive before PyTorch reads it, since `torch.export.load` runs code from the file.

PyTorch 2.13 unpickles sample inputs, custom objects and legacy weights, evaluates symbolic sizes as Python
(`sympify`), looks operators up by dotted path (`torch.os.system` is one), loads compiled kernels, imports
modules named in tree specs, and pastes names into the source of the graph's `forward`. Here

    pickles        must load with weights_only=True
    objects        custom and opaque ones, and compiled kernels, are refused
    operators      only torch.ops.aten, quantized_decomposed, operator.*, math.* and torch.sym_*
    expressions    only numbers, symbols, arithmetic and the functions sizes are made of
    tree specs     only tuple, list, dict
    names          only identifiers and dotted paths

The archive is read with the reader that PyTorch itself uses, so that both see the same members.
"""

from __future__ import annotations

import ast
import io
import json
import keyword
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from edgecnn.errors import LoadError, UntrustedPickleError
from edgecnn.load.export import first_line

_WEIGHTS = "data/weights/"
_CONSTANTS = "data/constants/"
_MAX_EXPRESSION = 2000
_MAX_EXPONENT = 16
_MAX_POWERS = 2
_POWERS = ("Pow", "FloatPow", "PowByNatural")

_FREE_TEXT = frozenset(
    {
        "stack_trace",
        "nn_module_stack",
        "torch_fn",
        "source_fn_stack",
        "from_node",
        "custom",
        "as_string",
        "as_strings",
    }
)
"""Strings that PyTorch keeps and never evaluates; guards_code is dropped after loading."""

_PLAIN = re.compile(r"[\w.\-/+ :]*")
_SYMBOL = re.compile(r"[a-z]{1,4}\d+")
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|quantized_decomposed)\.\w+(\.\w+)?|_operator\.\w+|math\.\w+|torch\.sym_\w+"
)
_FORBIDDEN_OPERATORS = re.compile(
    r"torch\.ops\.aten\.(from_file|_?save|_print)\b.*"
    r"|_operator\.(methodcaller|attrgetter|call|i?concat|set\w+|del\w+)"
)
_TREE_TYPES = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
_FUNCTIONS = frozenset(
    """
    FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv PowByNatural
    FloatPow FloatTrueDiv IntTrueDiv IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt
    RoundDecimal ToFloat Identity Max Min Integer Rational Float Add Mul Pow Abs floor ceiling
    Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan Eq Ne Lt Le Gt Ge And Or Not
    """.split()  # noqa: SIM905  a list of 50 quoted words is no easier to read
)
_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.Name, ast.Constant, ast.Load,
    ast.keyword, ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip


class _Refused(Exception):  # noqa: N818  never leaves this module
    """What in the archive could run code."""


def check_archive(path: Path, data: bytes, *, trust: bool) -> None:
    """Check that reading an archive cannot run code.

    Args:
        path: for messages.
        data: the whole file; the caller must read these very bytes afterwards.
        trust: skip the checks for code.

    Raises:
        UntrustedPickleError: naming what the archive wants to run.
        LoadError: if the archive is damaged.
    """
    _check_checksums(path, data)
    if trust:
        return
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(data))
        for name in reader.get_all_records():
            _check_member(reader, name)
    except _Refused as error:
        raise UntrustedPickleError(
            f"{path}: {error}, which could run any code; it was not loaded",
            hint="export the network again, or pass --trust if you trust the file's author",
        ) from error
    except Exception as error:
        raise LoadError(
            f"{path}: damaged .pt2 archive ({first_line(error)})", hint="copy or download it again"
        ) from error


def _check_checksums(path: Path, data: bytes) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()
    except Exception as error:
        raise LoadError(
            f"{path}: damaged .pt2 archive ({first_line(error)})", hint="copy or download it again"
        ) from error
    if damaged is not None:
        raise LoadError(
            f"{path}: damaged .pt2 archive (checksum of {damaged})", hint="copy or download it again"
        )


def _check_member(reader: Any, name: str) -> None:
    if name.startswith("data/aotinductor/"):
        raise _Refused(f"{name} is compiled code")
    if name.startswith("models/"):
        _check_program(json.loads(reader.get_record(name)))
    elif name.startswith("data/sample_inputs/") or (
        name.startswith((_WEIGHTS, _CONSTANTS)) and name.endswith(".pt")
    ):
        _check_pickle(reader, name)
    elif name.startswith((_WEIGHTS, _CONSTANTS)) and name.endswith(".json"):
        _check_payloads(
            reader, _WEIGHTS if name.startswith(_WEIGHTS) else _CONSTANTS, json.loads(reader.get_record(name))
        )


def _check_pickle(reader: Any, name: str) -> None:
    content = reader.get_record(name)
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise _Refused(
            f"{name} is a pickle that wants {wanted.group(1) if wanted else 'more than tensors'}"
        ) from error


def _check_payloads(reader: Any, folder: str, config: Any) -> None:
    for fqn, payload in config["config"].items():
        name = str(payload["path_name"])
        _check_text("fqn", fqn)
        if folder == _CONSTANTS and not name.startswith("tensor_"):
            raise _Refused(f"{folder}{name} is a pickled object")
        if payload.get("use_pickle"):
            _check_pickle(reader, folder + name)


def _check_program(program: Any) -> None:
    """Check all strings of the serialized graph; what a key does not say is treated as a name."""
    stack: list[tuple[str, Any]] = [("", program)]
    while stack:
        key, value = stack.pop()
        if isinstance(value, dict):
            if key == "graph" and value.get("custom_obj_values"):
                raise _Refused("the graph holds custom objects")
            for child_key, child in value.items():
                _check_text("key", child_key)
                stack.append((child_key, child))
        elif isinstance(value, list):
            if key != "guards_code":
                stack.extend((key, child) for child in value)
        elif isinstance(value, str):
            _check_text(key, value)


def _check_text(key: str, text: str) -> None:
    if key in _FREE_TEXT:
        return
    if key == "expr_str":
        _check_expression(text)
    elif key in ("target", "as_operator") or text.startswith(("torch.", "#")):
        if not _OPERATOR.fullmatch(text) or _FORBIDDEN_OPERATORS.fullmatch(text):
            raise _Refused(f"the graph calls {text!r}")
    elif key in ("in_spec", "out_spec"):
        _check_tree(json.loads(text)[1])
    elif key in ("name", "forward_arg_names"):
        if text and (not text.isidentifier() or keyword.iskeyword(text)):
            raise _Refused(f"the graph has a name {text[:80]!r}")
    elif not _PLAIN.fullmatch(text):
        raise _Refused(f"the graph has a {key} {text[:80]!r}")


def _check_tree(spec: Any) -> None:
    if spec["type"] not in _TREE_TYPES:
        raise _Refused(f"the graph takes or returns a {spec['type']}")
    context = json.loads(spec["context"]) if spec["context"] is not None else None
    for key in context or ():  # of a dict; PyTorch pastes them between quotes into source text
        if not isinstance(key, (str, int)) or not _PLAIN.fullmatch(str(key)):
            raise _Refused(f"the graph's inputs or outputs have a key {str(key)[:80]!r}")
    for child in spec["children_spec"]:
        _check_tree(child)


def _check_expression(text: str) -> None:
    if len(text) > _MAX_EXPRESSION:
        raise _Refused(f"a size is an expression of {len(text)} characters")
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError as error:
        raise _Refused(f"a size is {text[:80]!r}") from error
    powers = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            good = isinstance(node.func, ast.Name) and _is_safe_call(node.func.id, node)
            powers += isinstance(node.func, ast.Name) and node.func.id in _POWERS
        elif isinstance(node, ast.Name):
            good = (
                node.id in _FUNCTIONS or _SYMBOL.fullmatch(node.id) is not None or node.id in ("oo", "Symbol")
            )
        elif isinstance(node, ast.Constant):
            good = _is_safe_constant(node.value)
        elif isinstance(node, ast.BinOp):
            powers += isinstance(node.op, ast.Pow)
            good = not isinstance(node.op, (ast.LShift, ast.RShift))
        else:
            good = isinstance(node, _NODES)
        if not good or powers > _MAX_POWERS:
            raise _Refused(f"a size is {text[:80]!r}")


def _is_safe_call(name: str, call: ast.Call) -> bool:
    """Symbol('s0', positive=True, integer=True), or a function of sizes."""
    if name == "Symbol":
        flags = all(
            isinstance(k.value, ast.Constant) and isinstance(k.value.value, bool) for k in call.keywords
        )
        return flags and len(call.args) == 1 and isinstance(call.args[0], ast.Constant)
    if name in _POWERS:
        power = call.args[-1] if call.args else None
        if isinstance(power, ast.Call) and len(power.args) == 1:
            power = power.args[0]
        value = power.value if isinstance(power, ast.Constant) else None
        return isinstance(value, int) and value <= _MAX_EXPONENT and not call.keywords
    return name in _FUNCTIONS and not call.keywords


def _is_safe_constant(value: object) -> bool:
    if isinstance(value, str):
        return _SYMBOL.fullmatch(value) is not None
    return isinstance(value, (int, float)) and abs(value) < 2**63
