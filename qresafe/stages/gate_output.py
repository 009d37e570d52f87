"""A gate's result for machines: JUnit XML, which every CI server shows."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from qresafe.stages.gate import Check, GateResult

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(result: GateResult) -> str:
    """Return the result as JUnit XML: one test case per check.

    A check that fails is a `failure`; one that is unresolved or unmeasured is an `error` of that
    type; one that was not asked for and cannot be measured is `skipped`.
    """
    verdicts = [check.verdict for check in result.checks]
    counts = {
        "tests": len(verdicts),
        "failures": verdicts.count("fail"),
        "errors": verdicts.count("unresolved") + verdicts.count("unmeasured"),
        "skipped": verdicts.count("skipped"),
    }
    suites = ElementTree.Element("testsuites", name="qresafe gate")
    attributes = {"name": "qresafe.gate"} | {name: str(count) for name, count in counts.items()}
    suite = ElementTree.SubElement(suites, "testsuite", attributes)
    for check in result.checks:
        _case(suite, check, _clean(f"{result.baseline} -> {result.candidate}"))
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ElementTree.Element, check: Check, models: str) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname="qresafe.gate", name=check.axis)
    told = _clean(f"{models}: {check.reason}")
    if check.verdict == "pass":
        ElementTree.SubElement(case, "system-out").text = told
        return
    kinds = {"fail": "failure", "skipped": "skipped"}
    ending = ElementTree.SubElement(case, kinds.get(check.verdict, "error"), message=told)
    if check.verdict != "skipped":
        ending.set("type", check.verdict)


def _clean(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
