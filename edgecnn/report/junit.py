"""Checks as JUnit XML, which CI servers read: testsuites > testsuite > testcase > failure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree as ET

from edgecnn.report.budgets import Check

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render_junit(checks: Sequence[Check], name: str = "edgecnn check") -> str:
    """Return the XML of a list of checks.

    Args:
        checks: each becomes a test case, its report the class.
        name: of the suite.

    Example:
        >>> text = render_junit([Check("report.json", "onnx size", False, "2 MB, at most 1 MB")])
        >>> ET.fromstring(text).find("testsuite/testcase/failure").get("message")
        '2 MB, at most 1 MB'
    """
    counts = {
        "tests": str(len(checks)),
        "failures": str(sum(not check.passed for check in checks)),
        "errors": "0",
        "skipped": "0",
        "time": "0",
    }
    root = ET.Element("testsuites", {"name": _text(name), **counts})
    suite = ET.SubElement(root, "testsuite", {"name": _text(name), **counts})
    for check in checks:
        values = {"classname": _text(check.source), "name": _text(check.name), "time": "0"}
        case = ET.SubElement(suite, "testcase", values)
        if not check.passed:
            message = _text(check.message)
            failure = ET.SubElement(case, "failure", {"message": message, "type": "BudgetError"})
            failure.text = _text(check.line)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _text(value: str) -> str:
    """Return a text without the characters that XML 1.0 has no place for."""
    return _NOT_XML.sub("?", value)
