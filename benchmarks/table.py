"""The results of ``benchmarks.gpu`` as Markdown."""

from collections import defaultdict
from typing import Any

_BASELINES = ("copy", "eager")
_MOST_MESSAGES = 20


def _microseconds(figures: dict[str, Any], key: str = "microseconds") -> str:
    return f"{figures[key]['median']:.4g}" if key in figures else ""


def _cell(name: str, figures: dict[str, Any] | None) -> str:
    """Microseconds; beside the baselines also how many times eager's speed, and how many times the copy's time."""
    if figures is None:
        return ""
    if "microseconds" not in figures:
        return "error" if "error" in figures else "-"
    text = _microseconds(figures)
    if name in _BASELINES:
        return text
    ratios = []
    if "times_eager" in figures:
        ratios.append(f"{figures['times_eager']['median']:.2f}x eager")
    if "times_copy" in figures:
        ratios.append(f"{1 / figures['times_copy']['median']:.2f} copies")
    return f"{text} ({', '.join(ratios)})" if ratios else text


def _section(title: str, records: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for record in records for name in record["contenders"]))
    walls = [name for name in names if name != "copy"]
    head = ["case", "batch", *names, *(f"{name}, wall" for name in walls)]
    lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for record in records:
        contenders = record["contenders"]
        cells = [record["name"], str(record["shape"][0])]
        cells += [_cell(name, contenders.get(name)) for name in names]
        cells += [_microseconds(contenders.get(name, {}), "wall_microseconds") for name in walls]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _messages(title: str, messages: dict[str, str]) -> list[str]:
    """A line for each different message, with one of those who gave it."""
    groups: dict[str, list[str]] = defaultdict(list)
    for who, message in messages.items():
        groups[message].append(who)
    if not groups:
        return []
    lines = [f"### {title}", ""]
    for message, whom in list(groups.items())[:_MOST_MESSAGES]:
        others = f" and {len(whom) - 1} more" if len(whom) > 1 else ""
        lines.append(f"- {whom[0]}{others}: {message}")
    if len(groups) > _MOST_MESSAGES:
        lines.append(f"- and {len(groups) - _MOST_MESSAGES} other messages")
    return [*lines, ""]


def markdown(results: dict[str, Any]) -> str:
    """The tables, a section for each suite, mode and type, after what ran and before what did not."""
    facts = results["facts"]
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    lines = [f"# {facts.get('device', 'unknown device')}, {results['date'][:10]}", ""]
    lines += [f"Driver {facts.get('driver')}; {versions}.", ""]
    for part, outcome in results["parts"].items():
        lines.append(f"- {part}: {outcome['summary']} ({outcome['seconds']:.0f} s)")
    for name, value in results["ceilings"].items():
        lines.append(f"- {name.replace('_', ' ')}: {value:.4g}")
    lines += ["", "Median microseconds of a call, CUDA graph against CUDA graph; `wall` without graphs.", ""]
    sections = defaultdict(list)
    for record in results["cases"].values():
        if "error" not in record:
            sections[f"{record['suite']}, {record['mode']}, {record['dtype']}"].append(record)
    for title, records in sections.items():
        lines += _section(title, records)
    failed, skipped = {}, dict(results["skipped"])
    for record in results["cases"].values():
        if "error" in record:
            failed[record["id"]] = record["error"]
        for name, figures in record["contenders"].items():
            if "error" in figures:
                failed[f"{name} at {record['id']}"] = figures["error"]
            elif "skipped" in figures:
                skipped[f"{name} at {record['id']}"] = figures["skipped"]
    lines += _messages("Failed measurements", failed)
    tests = {name: outcome for name, outcome in results["tests"].items() if outcome["outcome"] == "failed"}
    lines += _messages("Failed tests", {name: _last_line(outcome["message"]) for name, outcome in tests.items()})
    lines += _messages("Skipped", skipped)
    return "\n".join(lines)


def _last_line(message: str) -> str:
    """Of a traceback: the error, without which test it was."""
    errors = [line[1:].strip() for line in message.splitlines() if line.startswith("E ")]
    return (errors or message.strip().splitlines() or [""])[-1 if not errors else 0][:300]
