"""The fairness report as one HTML page that needs nothing else: no network, no script, no font.

Reads the dict that report.make_report returns and computes nothing but places on an axis.

How the page stays safe and legible, whatever the data says:
- Labels, texts, ids and settings reach the page through `_text` alone (`_name` isolates them from
  the direction of the text around them). Other strings in here are markup already.
- The policy in the head forbids everything but the style below it, scripts above all.
- Figures are strips of SVG in rows of text, with places in percent: they are as wide as the screen,
  and long or right-to-left labels are set by the browser. Shapes and print say what colours say.
"""

import html
import math
import re
from itertools import zip_longest
from typing import NamedTuple

MANY_PAIRS = 200  # rows of a table that one may still read: 200 groups have 19,900 pairs
MANY_WORDS = 300  # of one utterance shown
LONG = 1000  # characters of one text shown
UNPRINTABLE = re.compile(
    "[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def to_html(report: dict) -> str:
    """The whole page. report: what report.make_report returns, schema 1."""
    systems = [report, *report["others"]]
    sections = [
        ("summary", "Summary", _summary(report, systems)),
        *(
            (f"system-{i}", f"By group: {_name(system['name'])}", _system(system, report["about"]))
            for i, system in enumerate(systems, 1)
        ),
        ("comparisons", "Systems compared", "".join(map(_comparison, report["comparisons"]))),
        ("leakage", "Leakage beside word error rates", _leakage(report)),
        ("method", "Method and limits", _method(report)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{title}</h2>{content}</section>'
        for key, title, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>Fairness report: {_text(report["name"])}</title>
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#summary">Skip to the summary</a>
<header>
<h1>Fairness report: word error rates by group</h1>
<p>{_name(report["name"])}{_dated(report["about"])}</p>
{_synthetic(report["about"])}
<nav aria-label="Contents"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
</body>
</html>
"""


# ---- texts and numbers ---------------------------------------------------------------------------


def _text(value: object, most: int = LONG) -> str:
    """Anything from the data as text or inside an attribute: the one place where it is escaped."""
    text = str(value)
    text = text if len(text) <= most else f"{text[:most]} … ({len(text):,} characters)"
    return html.escape(UNPRINTABLE.sub("\ufffd", text))


def _name(value: object, most: int = LONG) -> str:
    return f'<bdi dir="auto">{_text(value, most)}</bdi>'


def _number(value: float | None, form: str = "z,.2f") -> str:
    if value is None or not math.isfinite(value):
        return "n/a"
    form = form if abs(value) < 1e6 else ".2e"  # an interval of few speakers may reach e^500
    return format(value, form).replace("-", "\u2212")


def _count(value: int | None) -> str:
    return "n/a" if value is None else f"{value:,}"


def _percent(fraction: float | None) -> str:
    return _number(fraction if fraction is None else 100 * fraction)


def _points(fraction: float | None) -> str:
    """A difference of percentages: with its sign."""
    return _number(fraction if fraction is None else 100 * fraction, "+z,.2f")


def _p(p: float | None) -> str:
    return "&lt; 0.0001" if p is not None and p < 0.0001 else _number(p, ".4f")


def _p_is(p: float | None) -> str:
    return f"p = {_p(p)}".replace("= &lt;", "&lt;")


def _interval(interval: list | None, show=_percent) -> str:
    return "n/a" if interval is None else f"{show(interval[0])} to {show(interval[1])}"


def _sure(estimate: dict, show=_percent, unit: str = "") -> str:
    """An estimate in a sentence, its interval in parentheses."""
    return f"{show(estimate['value'])}{unit} ({_interval(estimate['interval'], show)})"


def _cells(estimate: dict | None, show=_percent) -> list[str]:
    """An estimate and its interval in two cells of a table."""
    estimate = estimate or {"value": None, "interval": None}
    return [show(estimate["value"]), _interval(estimate["interval"], show)]


def _wer(measures: dict) -> dict:
    return {"value": measures["wer"], "interval": measures["interval"]}


def _dated(about: dict) -> str:
    return f" · {_text(about['date'])}" if about.get("date") else ""


def _synthetic(about: dict) -> str:
    if not about.get("synthetic"):
        return ""
    return """<p class="synthetic"><strong>SYNTHETIC SPEECH.</strong> The voices were made by a
        program. The numbers show that the tools work; they say nothing about people.</p>"""


# ---- tables --------------------------------------------------------------------------------------


def _table(caption: str, head: list[str], rows: list[list[str]]) -> str:
    """caption: plain text. head and rows: markup; the first cell names its row."""
    texts = {i for row in rows for i, cell in enumerate(row) if cell.startswith("<bdi")} | {0}
    left = [' class="text"' if i in texts else "" for i in range(len(head))]
    body = ""
    for first, *rest in rows:
        cells = "".join(f"<td{side}>{cell}</td>" for side, cell in zip(left[1:], rest))
        body += f'<tr><th scope="row">{first}</th>{cells}</tr>'
    columns = [f'<th scope="col"{side}>{cell}</th>' for side, cell in zip(left, head)]
    return _frame(caption, columns, body)


def _frame(caption: str, columns: list[str], body: str) -> str:
    """A table that scrolls inside its box, by keyboard too, where the screen is narrow."""
    return f"""<div class="scroll" role="group" tabindex="0" aria-label="{_text(caption)}"><table>
        <caption><span>{_text(caption)}</span></caption>
        <thead><tr>{"".join(columns)}</tr></thead><tbody>{body}</tbody></table></div>"""


def _marks(measures: dict) -> str:
    compared, few = measures.get("compared", True), measures.get("few_clusters", False)
    left_out = "" if compared else ' <span class="mark">left out</span>'
    return left_out + (' <span class="mark">few</span>' if few else "")


def _group_table(column: str, groups: dict, overall: dict) -> str:
    head = ["group", "WER %", "95 % interval", "S %", "D %", "I %", "CER %", "utterances wrong %",
            "mean of speakers' WER %", "speakers", "utterances", "words"]  # fmt: skip
    rows = []
    for label, m in [(None, overall), *groups.items()]:
        rates = _kinds(m)
        others = (*rates, m["cer"], m["utterance_error_rate"], m["speaker_macro_wer"])
        counts = (m["speakers"], m["utterances"], m["words"])
        name = "<em>everyone</em>" if label is None else _name(label) + _marks(m)
        rows.append([name, *_cells(_wer(m)), *map(_percent, others), *map(_count, counts)])
    return _table(f"{column}: error rates by group".lstrip(": "), head, rows)


def _kinds(m: dict) -> list[float | None]:
    """Substitutions, deletions and insertions a word of the reference."""
    counts = (m["substitutions"], m["deletions"], m["insertions"])
    return [n / m["words"] if m["words"] else None for n in counts]


# ---- figures -------------------------------------------------------------------------------------


class Axis(NamedTuple):
    low: float
    high: float
    ticks: list[float]

    def at(self, x: float) -> str:
        place = (x - self.low) / (self.high - self.low)
        return f"{100 * min(max(place, 0), 1):.2f}%"

    def grid(self) -> str:
        places = map(self.at, self.ticks)
        return "".join(f'<line class="grid" x1="{x}" x2="{x}" y2="100%"/>' for x in places)

    def scale(self) -> str:
        """The last row of a figure: its ticks, in percent."""
        labels = [_number(100 * x, ",.6g") for x in self.ticks]
        texts = "".join(
            f'<text x="{self.at(x)}" y="1em">{label}</text>' for x, label in zip(self.ticks, labels)
        )
        title = f"<title>scale from {labels[0]} to {labels[-1]}</title>"
        return f'<li class="scale"><svg role="img">{title}{texts}</svg></li>'


def _axis(values: list[float], ends: list[float] = ()) -> Axis:
    """From 0 or below to all values, and to ends of intervals unless they dwarf the values."""
    furthest = 1.5 * max([0.05, *map(abs, values)])
    shown = [0.0, *values, *(min(max(x, -furthest), furthest) for x in ends)]
    low, high = min(shown), max(max(shown), min(shown) + 1e-4)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda n: abs(n - rough / power))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], ticks)


class Dot(NamedTuple):
    label: str
    estimate: dict
    shape: str = "dot"  # dot: a group compared; hollow: one left out; square: everyone
    remark: str = ""  # markup after the label


def _finite(values) -> list[float]:
    return [x for x in values if x is not None and math.isfinite(x)]


def _dot_plot(caption: str, dots: list[Dot], line: float | None, show=_percent) -> str:
    """Estimates and their intervals, one below the other. line: the value of a dashed line."""
    values = _finite([line, *(dot.estimate["value"] for dot in dots)])
    ends = _finite(x for dot in dots for x in dot.estimate["interval"] or ())
    axis = _axis(values, ends)
    unit = " %" if show is _percent else " points"
    ground = axis.grid()
    if _finite([line]):
        ground += '<line class="all" x1="{0}" x2="{0}" y2="100%"/>'.format(axis.at(line))
    rows = []
    for dot in dots:
        value, interval = _cells(dot.estimate, show)
        drawing, printed = ground + _mark(dot, axis), f"{value} <small>{interval}</small>"
        meaning = f"{value}{unit}, 95 % interval {interval}"
        rows.append(_row(dot.label, meaning, drawing, printed, dot.remark))
    return _figure(caption, rows, axis)


def _mark(dot: Dot, axis: Axis) -> str:
    value, interval = dot.estimate["value"], dot.estimate["interval"]
    if not _finite([value]):
        return '<text class="none" x="50%" y="50%">n/a</text>'
    drawing, at = "", axis.at(value)
    if interval is not None and len(_finite(interval)) == 2:
        low, high = interval
        ends = f'x1="{axis.at(low)}" x2="{axis.at(high)}"'
        drawing += f'<line class="reach" {ends} y1="50%" y2="50%"/>'
        drawing += '<text class="beyond" x="0" y="50%">‹</text>' if low < axis.low else ""
        drawing += '<text class="beyond" x="100%" y="50%">›</text>' if high > axis.high else ""
    if dot.shape == "dot":
        return f'{drawing}<circle cx="{at}" cy="50%" r="5"/>'
    return f'{drawing}<rect class="{dot.shape}" x="{at}" y="50%" width="10" height="10"/>'


def _row(label: str, meaning: str, drawing: str, printed: str, remark: str = "") -> str:
    """A row of a figure. meaning: what one who cannot see the drawing is told."""
    return f"""<li><span class="label">{_name(label)}{remark}</span>
        <svg role="img"><title>{_text(label)}: {meaning}</title>{drawing}</svg>
        <span class="value">{printed}</span></li>"""


def _figure(caption: str, rows: list[str], axis: Axis) -> str:
    return f"""<figure><figcaption>{_text(caption)}</figcaption>
        <ul class="plot">{"".join(rows)}{axis.scale()}</ul></figure>"""


def _rates_plot(column: str, groups: dict, overall: dict) -> str:
    dots = [Dot("everyone", _wer(overall), "square")]
    for label, m in groups.items():
        dots.append(Dot(label, _wer(m), "dot" if m["compared"] else "hollow", _marks(m)))
    caption = f"""{column}: word error rate in percent with its 95 % interval. Discs: groups
        compared; hollow squares: groups left out; filled square and dashed line: everyone."""
    return _dot_plot(caption, dots, overall["wer"])


def _kinds_plot(column: str, groups: dict) -> str:
    """Stacked bars: substitutions filled, deletions striped, insertions hollow."""
    kinds = {label: _kinds(m) for label, m in groups.items()}
    axis = _axis([sum(_finite(rates)) for rates in kinds.values()])
    rows = []
    for label, rates in kinds.items():
        words = ", ".join(f"{name} {_percent(x)} %" for name, x in
                          zip(("substitutions", "deletions", "insertions"), rates))  # fmt: skip
        drawing, start = axis.grid(), 0.0
        for name, rate in zip("sdi", _finite(rates)):
            if rate:
                drawing += _bar(name, start, start + rate, axis)
            start += rate
        printed = " · ".join(f"{name} {_percent(x)}" for name, x in zip("SDI", rates))
        rows.append(_row(label, words, drawing, f"<small>{printed}</small>"))
    caption = f"""{column}: kinds of errors in percent of the words spoken. Filled: substitutions
        (S); striped: deletions (D); hollow: insertions (I). All together: the word error rate."""
    return _figure(caption, rows, axis)


def _bar(kind: str, start: float, end: float, axis: Axis) -> str:
    place = f'x="{axis.at(start)}" y="50%" width="{axis.at(axis.low + end - start)}" height="14"'
    bar = f'<rect class="bar {kind}" {place}/>'
    if kind == "d":
        ends = f'x1="{axis.at(start)}" x2="{axis.at(end)}"'
        bar += f'<line class="stripes" {ends} y1="50%" y2="50%"/>'
    return bar


def _heat_map(column: str, part: dict) -> str:
    """Two crossed columns as rows and columns. Empty if the labels do not say how to split them."""
    names = column.split("+")
    cells = {tuple(label.split(" + ")): label for label in part["groups"] if " + " in label}
    if len(names) != 2 or not cells or any(len(key) != 2 for key in cells):
        return ""
    down, across = ([*dict.fromkeys(key[i] for key in cells)] for i in (0, 1))
    highest = max(_finite(part["groups"][label]["wer"] for label in cells.values()), default=0)
    head = [f"{_name(names[0])} \\ {_name(names[1])}", *map(_name, across)]
    body = ""
    for first in down:
        found = [_heat_cell(cells.get((first, second)), part, highest) for second in across]
        body += f'<tr><th scope="row">{_name(first)}</th>{"".join(found)}</tr>'
    caption = f"{names[0]} by {names[1]}: WER %, the higher the more colour"
    return _frame(caption, [f'<th scope="col">{cell}</th>' for cell in head], body)


def _heat_cell(label: str | None, part: dict, highest: float) -> str:
    if label is None:
        return "<td>none</td>"
    m = part["groups"][label]
    strength = 0.5 * m["wer"] / highest if _finite([m["wer"]]) and highest else 0
    marks = "".join(
        f' <span class="mark">{end}</span>' for end in ("worst", "best") if part[end] == label
    )
    return f"""<td class="heat" style="--strength: {strength:.2f}"><b>{_percent(m["wer"])}</b>
        <br><small>{_interval(m["interval"])}</small>{marks}{_marks(m)}</td>"""


# ---- parts of the page ---------------------------------------------------------------------------


def _summary(report: dict, systems: list[dict]) -> str:
    m = report["overall"]
    speakers = "" if m["speakers"] is None else f" of {_count(m['speakers'])} speakers"
    spoken = f"{_count(m['utterances'])} utterances{speakers} with {_count(m['words'])} words"
    rate = _sure(_wer(m), unit=" %")
    lines = [
        f"Over {spoken}, {_name(report['name'])} has a word error rate of {rate}. "
        "In parentheses: 95 % intervals."
    ]
    lines += [_verdict(column, part) for column, part in report["by"].items()]
    for c in report["comparisons"]:
        lines += [
            f"{_versus(c)} by {_name(column)}. {_change(part)}" for column, part in c["by"].items()
        ]
    warnings = "".join(f"<li>{_name(warning)}</li>" for warning in report["warnings"])
    if warnings:
        warnings = f'<div class="warnings"><h3>Warnings</h3><ul>{warnings}</ul></div>'
    if not report["by"]:
        warnings += _group_table("", {}, m)
    return "".join(f"<p>{line}</p>" for line in lines) + warnings + _gap_table(systems)


def _verdict(column: str, part: dict) -> str:
    """Who fares worst and best, and whether chance alone would do that."""
    worst, best = part["worst"], part["best"]
    if worst is None or best is None or part["gap"]["value"] is None:
        return f"<strong>{_name(column)}</strong>: fewer than two groups to compare, so no gap."
    high, low = (_sure(_wer(part["groups"][label]), unit=" %") for label in (worst, best))
    said = f"""<strong>{_name(column)}</strong>: the word error rate is highest for
        <strong>{_name(worst)}</strong>, {high}, and lowest for <strong>{_name(best)}</strong>,
        {low}. The gap is <strong>{_percent(part["gap"]["value"])} points</strong>
        ({_interval(part["gap"]["interval"])}), the ratio {_sure(part["ratio"], _number)}."""
    test = part["no_difference"]
    if test is None:
        return f"{said} Not tested against chance."
    if "refused" in test:
        return f"{said} Not tested against chance: {_name(test['refused'])}."
    gap = test["gap"]
    chance = "these data fit chance alone; that does not show that the groups fare alike."
    if test["p"] <= 0.05:
        chance = "differences like these are seldom chance alone."
    return f"""{said} If labels meant nothing, a gap of {_percent(gap["expected"])} points would
        still be expected, and one above {_percent(gap["percentile_95"])} in 5 % of cases. Test
        of no difference between the groups: <strong>{_p_is(test["p"])}</strong>; {chance}"""


def _gap_table(systems: list[dict]) -> str:
    head = ["groups", "system", "worst", "best", "gap, points", "95 % interval",
            "expected if labels meant nothing", "95th percentile of that", "p of the gap",
            "p of no difference"]  # fmt: skip
    rows = []
    for system in systems:
        for column, part in system["by"].items():
            ends = ["n/a" if part[end] is None else _name(part[end]) for end in ("worst", "best")]
            test = part["no_difference"] or {}
            null = [*_null(test, "gap"), _p(test.get("p"))]
            names = [_name(column), _name(system["name"]), *ends]
            rows.append([*names, *_cells(part["gap"]), *null])
    return _table("Gaps beside what chance alone would give", head, rows) if rows else ""


def _null(test: dict, name: str) -> list[str]:
    """Expected, 95th percentile and p of one disparity in the permutation test."""
    null = test.get(name) or {}
    return [_percent(null.get("expected")), _percent(null.get("percentile_95")), _p(null.get("p"))]


def _system(system: dict, about: dict) -> str:
    columns = system["by"].items()
    return "".join(_column(column, part, system["overall"], about) for column, part in columns)


def _column(column: str, part: dict, overall: dict, about: dict) -> str:
    """All about one grouping by one system."""
    groups = part["groups"]
    examples = _examples(part.get("examples") or {})
    return f"""<h3>{_name(column)}</h3>
        {_rates_plot(column, groups, overall)}
        {_group_table(column, groups, overall)}
        {_left_out(groups, about)}
        {_heat_map(column, part)}
        {_kinds_plot(column, groups)}
        <h4>How far apart</h4>
        {_disparity_table(column, part)}
        {_pairs(f"{column}: each pair of groups, difference in WER", part["pairs"])}
        {_adjusted(column, part["adjusted"])}
        {f"<h4>Utterances with the most errors</h4>{examples}" if examples else ""}"""


def _left_out(groups: dict, about: dict) -> str:
    notes = []
    if any(not m["compared"] for m in groups.values()):
        notes.append(f"""<b>left out</b>: shown, but in no gap, test or mean over groups, for want
            of a label, of words, or of {_count(about.get("min_speakers"))} speakers and
            {_count(about.get("min_utterances"))} utterances.""")
    if any(m["few_clusters"] for m in groups.values()):
        notes.append("""<b>few</b>: so few speakers (or what stands for them, see the settings)
            that interval and test deserve less trust.""")
    return f'<p class="note">{" ".join(notes)}</p>' if notes else ""


def _disparity_table(column: str, part: dict) -> str:
    head = ["measure", "value", "95 % interval", "expected if labels meant nothing",
            "95th percentile of that", "p"]  # fmt: skip
    ratio, test = part["ratio"], part["no_difference"] or {}
    rows = [
        ["gap: worst minus best, points", *_cells(part["gap"]), *_null(test, "gap")],
        ["standard deviation, points", *_cells(part["deviation"]), *_null(test, "deviation")],
        ["mean over groups, %", *_cells(part["macro"]), "–", "–", "–"],
        ["ratio: worst to best", *_cells(ratio, _number), "–", "–", "–"],
        ["gap relative to the best, %", _percent(part["relative_gap"]), *["–"] * 4],
        ["no difference at all", *["–"] * 4, _p(test.get("p"))],
    ]
    refused = f'<p class="note">{_name(test["refused"])}</p>' if "refused" in test else ""
    return _table(f"{column}: measures of disparity", head, rows) + refused


def _pairs(caption: str, pairs: list[dict]) -> str:
    """Pairwise differences, folded away where they are many, and cut where nobody reads them."""
    if not pairs:
        return ""
    head = ["group", "against", "difference, points", "95 % interval"]
    head += (["ratio", "95 % interval of it"] if "ratio" in pairs[0] else []) + ["p", "Holm p"]
    shown = sorted(pairs, key=_by_p)[:MANY_PAIRS] if len(pairs) > MANY_PAIRS else pairs
    rows = []
    for pair in shown:
        row = [_name(pair["group"]), _name(pair["other"]), *_cells(pair["difference"], _points)]
        row += _cells(pair["ratio"], _number) if "ratio" in pair else []
        rows.append([*row, _p(pair["p"]), _p(pair["p_holm"])])
    if len(shown) < len(pairs):
        caption += f": the {len(shown)} with the smallest p of {len(pairs):,}; all in report.json"
    table = _table(caption, head, rows)
    if len(pairs) <= 12:
        return table
    return f"<details><summary>{_text(caption)}</summary>{table}</details>"


def _by_p(pair: dict) -> float:
    return 2.0 if pair["p"] is None else pair["p"]


def _adjusted(column: str, adjusted: dict | None) -> str:
    if adjusted is None:
        return ""
    if "refused" in adjusted:
        return f'<p class="note">No adjusted ratios: {_name(adjusted["refused"])}.</p>'
    rows = [
        [kind + _name(label), _number(r["ratio"]), _interval(r["interval"], _number), _p(r["p"])]
        for kind, ratios in (("", adjusted["groups"]), ("held fixed: ", adjusted["covariates"]))
        for label, r in ratios.items()
    ]
    held = ", ".join(map(str, adjusted["for"]))
    caption = f"{column}: ratios of error rates to {adjusted['reference']} with {held} held fixed"
    return f"""{_table(caption, ["group", "ratio", "95 % interval", "p"], rows)}
        <p class="note">Poisson regression on words, errors robust to dependence within speakers.
        {_count(adjusted["utterances"])} utterances; left out for want of words, label or covariate:
        {_count(adjusted["left_out"])}. Of no difference at all: {_p_is(adjusted["p"])}.</p>"""


# ---- utterances ----------------------------------------------------------------------------------


def _examples(examples: dict) -> str:
    folded = []
    for label, utterances in examples.items():
        items = "".join(
            f"<li>{_name(u['id'])}: {_count(u['errors'])} errors, {_count(u['words'])} words"
            f"{_aligned(u['alignment'])}</li>"
            for u in utterances
        )
        folded.append(f"<details><summary>{_name(label)}</summary><ol>{items}</ol></details>")
    if not folded:
        return ""
    key = """<p class="note">Above, what was said (<s>struck through</s> where it was not
        recognised); below, what was recognised (<u>underlined</u> where it was not said).</p>"""
    return key + "".join(folded)


def _aligned(alignment: list) -> str:
    """What was said above what was recognised, word over word."""
    words = []
    for kind, said, heard in alignment:
        pairs = zip_longest(said.split(), heard.split(), fillvalue="")
        words += [_word(kind, a, b) for a, b in pairs]
    left = len(words) - MANY_WORDS
    rest = f" … and {left:,} more words" if left > 0 else ""
    return f'<p class="aligned" dir="auto">{" ".join(words[:MANY_WORDS])}{rest}</p>'


def _word(kind: str, said: str, heard: str) -> str:
    """The hidden words are for those who hear the page."""
    if kind == "equal":
        same = f'<span aria-hidden="true">{_text(heard)}</span>'
        return f'<span class="word"><span>{_text(said)}</span>{same}</span>'
    meaning = {"substitute": "recognised as", "delete": "left out", "insert": "added"}[kind]
    meaning = f'<span class="hidden" lang="en" dir="ltr"> ({meaning}) </span>'
    above = f"<s>{_text(said)}</s>{meaning}" if said else ""
    below = f"<u>{_text(heard)}</u>{'' if said else meaning}" if heard else ""
    return f'<span class="word wrong">{above}{below}</span>'


# ---- systems compared ----------------------------------------------------------------------------


def _versus(c: dict) -> str:
    return f"<strong>{_name(c['a'])}</strong> (A) and <strong>{_name(c['b'])}</strong> (B)"


def _comparison(c: dict) -> str:
    test, overall = c["mapsswe"], c["overall"]
    return f"""<h3>{_versus(c)}</h3>
        <p>On the {_count(c["utterances"])} utterances that all systems have, the rate of A
        minus that of B is {_sure(overall, _points, " points")}: {_lower(overall)}. MAPSSWE, for
        comparison with other work (it takes utterances to be independent, which those of one
        speaker are not): {_number(test["mean"], "+z.4f")} errors an utterance, statistic
        {_number(test["statistic"])}, {_p_is(test["p"])}.</p>
        {"".join(_compared(column, part) for column, part in c["by"].items())}"""


def _lower(difference: dict) -> str:
    if difference["interval"] is None:
        return "how sure that is, the data cannot tell"
    low, high = difference["interval"]
    errs_less = "B errs less" if low > 0 else "A errs less" if high < 0 else None
    return errs_less or "which of them errs less, these data do not tell"


def _compared(column: str, part: dict) -> str:
    caption = f"""{column}: word error rate of A minus that of B, in points, with its 95 % interval.
        Right of 0, B errs less."""
    dots = [Dot(label, estimate) for label, estimate in part["groups"].items()]
    gaps = [("of A", "gap_a", _percent), ("of B", "gap_b", _percent),
            ("that of A minus that of B", "gap_change", _points)]  # fmt: skip
    rows = [[name, *_cells(part[key], show)] for name, key, show in gaps]
    pairs = f"{column}: difference of each pair by A minus that by B"
    return f"""<h4>{_name(column)}</h4><p>{_change(part)}</p>
        {_dot_plot(caption, dots, 0.0, _points)}
        {_table(f"{column}: did the gap change?", ["gap", "points", "95 % interval"], rows)}
        {_pairs(pairs, part["pairs"])}"""


def _change(part: dict) -> str:
    """Did the disparity shrink? In words."""
    change, interval = part["gap_change"]["value"], part["gap_change"]["interval"]
    if change is None:
        return "Fewer than two groups to compare, so no gap to change."
    said = f"""The gap of A is {_percent(part["gap_a"]["value"])} points, that of B
        {_percent(part["gap_b"]["value"])}. A minus B: {_sure(part["gap_change"], _points)};"""
    if interval is None:
        return f"{said} how sure that is, the data cannot tell."
    if interval[0] > 0:
        return f"{said} <strong>the disparity is smaller with B</strong>."
    if interval[1] < 0:
        return f"{said} <strong>the disparity is larger with B</strong>."
    return f"{said} <strong>these data do not tell whether the disparity changed</strong>."


# ---- leakage -------------------------------------------------------------------------------------

PROBES = {
    "linear": "linear probe",
    "random_init_linear": "linear probe, untrained encoder",
    "nonlinear": "nonlinear probe",
    "random_init_nonlinear": "nonlinear probe, untrained encoder",
}


def _leakage(report: dict) -> str:
    leakage = report["leakage"]
    if not leakage:
        return ""
    said = f"""<p>How well a probe tells a speaker's group from embeddings of
        {_name(leakage.get("model"))} ({_count(leakage.get("n"))} utterances): balanced accuracy on
        speakers it was not trained on. <strong>Neither leakage nor a gap in word error rates is a
        proxy for the other</strong>: a recogniser may hold a group and serve it well, or hide it
        and serve it badly.</p>"""
    gaps = {column: part["gap"] for column, part in report["by"].items()}
    return said + "".join(
        _probed(column, found, gaps.get(column)) for column, found in leakage["columns"].items()
    )


def _probed(column: str, found: dict, gap: dict | None) -> str:
    dots = [
        Dot(name, found[key], "hollow" if "random" in key else "dot")
        for key, name in PROBES.items()
        if found.get(key)
    ]
    rows = [[dot.label, *_cells(dot.estimate)] for dot in dots]
    rows += [
        ["chance", _percent(found.get("chance")), "–"],
        ["share of the largest group", _percent(found.get("majority")), "–"],
        ["gap in word error rates, points", *_cells(gap)],
    ]
    sizes = ", ".join(f"{_name(g)} {_count(n)}" for g, n in (found.get("groups") or {}).items())
    head = ["measure", "% or points", "95 % interval"]
    caption = f"{column}: balanced accuracy in percent. Hollow: untrained; dashed line: chance."
    return f"""<h3>{_name(column)}</h3>
        {_dot_plot(caption, dots, found.get("chance"))}
        {_table(f"{column}: leakage beside the gap", head, rows)}
        <p class="note">{_count(found.get("speakers"))} speakers; utterances: {sizes}.</p>"""


# ---- method and limits ---------------------------------------------------------------------------


def _method(report: dict) -> str:
    about = report["about"]
    rows = [[_text(name), _setting(value)] for name, value in about.items()]
    rows.append(["schema of report.json", _count(report["schema"])])
    draws, cluster = _count(about.get("draws")), _name(about.get("cluster") or "speaker")
    synthetic = "<li>The speech is synthetic: nothing here is about people.</li>"
    return f"""<h3>Settings</h3>{_table("What the numbers rest on", ["setting", "value"], rows)}
        <h3>How the numbers were made</h3>
        <ul>
        <li>WER = (S + D + I) / words of the reference: substitutions, deletions and insertions are
        summed over all utterances of a group first and divided last, so it can exceed 100 %.
        Insertions into an empty reference count. CER is the same of characters.</li>
        <li>Intervals: 95 %, symmetric bootstrap-t, {draws} draws of whole clusters (here:
        {cluster}), as utterances of one speaker resemble one another; if it is the utterance, they
        are too narrow where speakers have several. The interval of a gap, a standard deviation or a
        change in gap is conservative. n/a: the data cannot tell.</li>
        <li>Test of no difference: labels are dealt anew to whole clusters {draws} times; p is the
        share of deals with a statistic (differences in units of their standard errors) as large as
        the observed one. The p of the bare gap or deviation also answers to groups that differ in
        spread alone.</li>
        <li>The gap is the highest rate minus the lowest, so it is above zero even where groups do
        not differ, and the more so the more and the smaller the groups: read it beside the gap
        expected if labels meant nothing.</li>
        <li>Pairs: interval and p are for each pair alone, by the same bootstrap; Holm p is
        corrected for all pairs of one grouping, not for several groupings.</li>
        <li>Systems are compared on the same utterances and the same draws.</li>
        </ul>
        <h3>What the numbers cannot say</h3>
        <ul>
        <li>A group label is not a cause. Groups may differ in what was read, in microphones, noise,
        rate of speech; adjusted ratios hold fixed only what was measured.</li>
        <li>No evidence of a difference is not evidence of no difference: with few speakers, large
        differences go unseen. The interval says how large they may be.</li>
        <li>Intervals are about these speakers and others drawn like them; not about other
        recordings, texts, rooms or languages, nor about errors in references or labels.</li>
        <li>WER counts all words alike; what an error costs whom, it does not say.</li>
        <li>Leakage is a lower bound: another probe may find more. That an adversary in training
        failed to find a group does not mean that the group is gone, and that it is gone does not
        mean equal error rates.</li>
        {synthetic if about.get("synthetic") else ""}
        </ul>"""


def _setting(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_name, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return _name(value, 100 * LONG)


# ---- style ---------------------------------------------------------------------------------------

STYLE = """
:root { --ink: #1b1b1b; --soft: #595959; --paper: #fff; --line: #d4d4d4;
  --accent: #0b4f8a; --heat: 196 82 0; --loud: #8a1500; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e6e3; --soft: #a9a7a3; --paper: #16181a;
  --line: #3d4043; --accent: #8ec5f5; --heat: 240 140 50; --loud: #ff9d85; } }
* { box-sizing: border-box; }
html { color: var(--ink); background: var(--paper); accent-color: var(--accent);
  font: 1rem/1.55 Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, serif; }
body { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere; }
h1, h2, h3, h4, table, figure, nav, .note, .value, summary, .mark {
  font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .8rem; padding-top: .6rem;
  border-top: 2px solid var(--ink); }
h3 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
h4 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
h3 strong { font-weight: inherit; }
p, main > section > ul { max-width: 44rem; }
p { margin: .6rem 0; }
a { color: var(--accent); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.skip { position: absolute; left: -100rem; background: var(--paper); padding: .5rem 1rem; }
.skip:focus { left: 1rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; padding: 0; list-style: none; }
.synthetic, .warnings { border: 2px solid var(--loud); padding: .6rem 1rem; margin: 1rem 0;
  max-width: 44rem; }
.synthetic strong { color: var(--loud); letter-spacing: .05em; }
.warnings h3 { margin: 0; color: var(--loud); }
.warnings ul { margin: .3rem 0; padding-left: 1.2rem; }
.note, figcaption, caption { color: var(--soft); font-size: .875rem; line-height: 1.4; }
.mark { font-size: .75rem; border: 1px solid currentColor; border-radius: 3px; padding: 0 .3em;
  color: var(--soft); font-weight: 400; white-space: nowrap; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
caption span { display: inline-block; position: sticky; left: 0;
  max-width: min(44rem, calc(100vw - 2rem)); }
th, td { padding: .35rem .6rem; text-align: right; vertical-align: top; overflow-wrap: normal;
  border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--ink); font-weight: 600;
  max-width: 11rem; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0;
  background: var(--paper); min-width: min(9rem, 30vw); max-width: min(16rem, 35vw);
  font-weight: 600; overflow-wrap: break-word; }
.text { text-align: left; white-space: normal; overflow-wrap: break-word; min-width: 6rem;
  max-width: 16rem; }
small { color: var(--soft); font-size: .85em; }
.heat { background: rgb(var(--heat) / var(--strength)); print-color-adjust: exact; }
.heat small, .heat .mark { color: inherit; }
figure { margin: 1.4rem 0 .8rem; }
figcaption { max-width: 44rem; margin-bottom: .4rem; }
.plot { list-style: none; margin: 0; padding: 0; }
.plot li { display: grid; grid-template-columns: minmax(0, 11rem) minmax(0, 1fr) 12rem;
  grid-auto-rows: minmax(1.8rem, auto); column-gap: 1.4rem; align-items: center;
  break-inside: avoid; }
.label { font-size: .875rem; line-height: 1.25; padding: .25rem 0; }
.value { font-size: .875rem; font-variant-numeric: tabular-nums; line-height: 1.25; }
svg { display: block; width: 100%; height: 0; min-height: 100%; overflow: visible;
  font: .75rem system-ui, Arial, sans-serif; fill: var(--ink); print-color-adjust: exact; }
.scale svg { grid-column: 2; fill: var(--soft); text-anchor: middle; }
.grid { stroke: var(--line); }
.all { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 4 3; }
.reach { stroke: var(--accent); stroke-width: 2.5; }
circle, .square { fill: var(--accent); stroke: var(--paper); stroke-width: 1.5; }
.square { fill: var(--ink); }
.hollow { fill: var(--paper); stroke: var(--accent); stroke-width: 2; }
.square, .hollow { transform: translate(-5px, -5px); }
.none, .beyond { text-anchor: middle; dominant-baseline: central; fill: var(--soft); }
.beyond { font-size: 1.4rem; fill: var(--accent); }
.bar { fill: var(--paper); stroke: var(--accent); transform: translateY(-7px); }
.s { fill: var(--accent); }
.stripes { stroke: var(--accent); stroke-width: 14; stroke-dasharray: 2 3; }
details { margin: .4rem 0; border-left: 3px solid var(--line); padding-left: .8rem; }
summary { cursor: pointer; font-size: .9rem; padding: .2rem 0; }
ol { padding-left: 1.6rem; }
.aligned { max-width: none; line-height: 1.35; margin: .3rem 0 1rem; }
.word { display: inline-flex; flex-direction: column; vertical-align: top; margin-right: .15em;
  max-width: 100%; min-height: 2.7em; }
.word:not(.wrong) > :last-child { color: var(--soft); }
.wrong > s, .wrong > u { font-weight: 700; color: var(--loud); text-decoration-thickness: 2px; }
.wrong > u { margin-top: auto; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media (max-width: 42rem) {
  th, td { padding: .35rem .4rem; }
  .plot li { grid-template-columns: 1fr auto; padding-bottom: .3rem; }
  .plot svg { grid-column: 1 / -1; grid-row: 2; width: calc(100% - 2.4rem);
    margin: 0 1.2rem; }
  .plot .scale svg { grid-row: 1; }
}
@media print {
  @page { margin: 15mm; }
  :root { --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --accent: #0b4f8a;
    --heat: 196 82 0; --loud: #8a1500; }
  html { font-size: 10pt; }
  body { max-width: none; padding: 0; }
  nav, .skip { display: none; }
  .scroll { overflow: visible; }
  table { font-size: 7pt; }
  th, td { padding: .2rem .25rem; }
  h2, h3, h4, caption, figcaption, summary { break-after: avoid; }
  table, figure, tr, ol li { break-inside: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
