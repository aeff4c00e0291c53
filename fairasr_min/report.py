"""Word error rate by group, as a table for the terminal, Markdown and JSON. No torch here."""

from fairasr_min.wer import Errors, add, by_group, disparity

MISSING = "(missing)"


def make_report(errors: list[Errors], groups: dict[str, list[str | None]], about: dict) -> dict:
    """The report as plain data: everything that is shown or written is read from here.

    errors: one an utterance. groups: each column's label of each utterance, None for missing.
    about: what the numbers rest on (manifest, model, commit, ...), copied into the report.
    """
    columns = {}
    for column, labels in groups.items():
        summed = by_group(errors, [None if label == MISSING else label for label in labels])
        gap = disparity(summed)
        columns[column] = {
            "groups": {label or MISSING: _counts(e) for label, e in summed.items()},
            "disparity": gap._asdict() if gap else None,
        }
    return {"about": about, "overall": _counts(add(errors)), "by": columns}


def _counts(errors: Errors) -> dict:
    return {**errors._asdict(), "wer": errors.wer}


def _percent(fraction: float | None) -> str:
    return "n/a" if fraction is None else f"{100 * fraction:.2f}"


HEADER = ["", "WER %", "utterances", "words", "S", "D", "I"]


def _cells(name: str, c: dict) -> list[str]:
    names = ("utterances", "words", "substitutions", "deletions", "insertions")
    return [name, _percent(c["wer"]), *(f"{c[n]:,}" for n in names)]


def _summary(column: str, gap: dict | None) -> str:
    if gap is None:
        return f"{column}: fewer than two groups with words; no gap"
    ratio = "n/a" if gap["ratio"] is None else f"{gap['ratio']:.2f}"
    return (
        f"worst group {gap['worst']}; gap to the best ({gap['best']}) "
        f"{100 * gap['gap']:.2f} points, ratio {ratio}"
    )


def _tables(report: dict):
    """(column, rows of cells, summary line) for each column; the first row is everyone."""
    overall = _cells("all", report["overall"])
    if not report["by"]:
        yield "", [overall], ""
    for column, part in report["by"].items():
        rows = [overall, *(_cells(name, c) for name, c in part["groups"].items())]
        yield column, rows, _summary(column, part["disparity"])


def to_text(report: dict) -> str:
    """Aligned tables for a terminal."""
    lines = _notes(report)
    for column, rows, summary in _tables(report):
        rows = [[column, *HEADER[1:]], *rows]
        widths = [max(map(len, cells)) for cells in zip(*rows)]
        lines.append("")
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
            lines.append("  ".join(cells))
        lines += [summary] if summary else []
    return "\n".join(lines)


def to_markdown(report: dict) -> str:
    """The same tables as Markdown, with what they rest on."""
    lines = ["# Word error rate by group", "", *(f"{_escape(note)}  " for note in _notes(report))]
    for column, rows, summary in _tables(report):
        lines += ["", f"## {_escape(column or 'all')}", ""]
        lines.append("| " + " | ".join([_escape(column or "group"), *HEADER[1:]]) + " |")
        lines.append("|---" + "|---:" * (len(HEADER) - 1) + "|")
        lines += ["| " + " | ".join(map(_escape, row)) + " |" for row in rows]
        lines += ["", _escape(summary)] if summary else []
    lines += ["", "## What the numbers rest on", ""]
    lines += [f"- {_escape(f'{name}: {value}')}" for name, value in report["about"].items()]
    return "\n".join(lines) + "\n"


def _notes(report: dict) -> list[str]:
    about = report["about"]
    corpus = "SYNTHETIC speech" if about.get("synthetic") else "speech"
    notes = [f"{corpus}: {about['manifest']}", f"recognised by: {about['model']}"]
    if about.get("synthetic"):
        notes.append("Synthetic voices: these numbers say nothing about people.")
    notes.append("WER = (S + D + I) / words of the reference, counted over all of a group's words.")
    return notes


def _escape(text: str) -> str:
    text = " ".join(text.splitlines())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
