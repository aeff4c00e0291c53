"""The HTML report: every number is there, the data stays text, and all of it can be read aloud."""

import copy
import re
from html.parser import HTMLParser

import pytest

from fairasr_min.report_html import LONG, MANY_PAIRS, MANY_WORDS, to_html

# ---- reports to show -----------------------------------------------------------------------------


def estimate(value, width=0.02):
    return {"value": value, "interval": [value - width, value + width]}


NOTHING = {"value": None, "interval": None}


def measures(wer=0.1234, words=1000, speakers=40, **others):
    """Made so that S, D and I are 50, 30 and 20 % of the errors."""
    errors = round(wer * words)
    s, d = errors // 2, 3 * errors // 10
    return {
        "utterances": words // 8,
        "speakers": speakers,
        "words": words,
        "substitutions": s,
        "deletions": d,
        "insertions": errors - s - d,
        "wer": wer,
        "interval": [0.8 * wer, 1.25 * wer],
        "characters": 5 * words,
        "character_errors": 2 * errors,
        "cer": 0.4 * wer,
        "wrong_utterances": words // 20,
        "utterance_error_rate": 0.4,
        "speaker_macro_wer": 1.1 * wer,
    } | others


def column(rates, **others):
    """A part of `by` from {label: WER}; the last label is left out, the first has few speakers."""
    labels = list(rates)
    groups = {
        label: {**measures(wer), "compared": True, "few_clusters": False}
        for label, wer in rates.items()
    }
    groups[labels[0]]["few_clusters"] = True
    groups[labels[-1]]["compared"] = len(labels) == 1
    compared = {label: rates[label] for label in labels if groups[label]["compared"]}
    worst, best = max(compared, key=compared.get), min(compared, key=compared.get)
    gap = compared[worst] - compared[best]
    null = {"observed": gap, "expected": 0.0211, "percentile_95": 0.0433, "p": 0.0123}
    one = len(compared) < 2
    pairs = [
        {
            "group": a,
            "other": b,
            "difference": estimate(rates[a] - rates[b]),
            "ratio": estimate(rates[a] / (rates[b] or 1)),
            "p": 0.0234,
            "p_holm": 0.0345,
        }
        for i, a in enumerate(compared)
        for b in list(compared)[i + 1 :]
    ]
    return {
        "groups": groups,
        "macro": estimate(sum(compared.values()) / len(compared)),
        "worst": None if one else worst,
        "best": None if one else best,
        "gap": NOTHING if one else estimate(gap),
        "ratio": NOTHING if one else estimate(rates[worst] / (rates[best] or 1), 0.2),
        "relative_gap": None if one or not rates[best] else gap / rates[best],
        "deviation": NOTHING if one else estimate(gap / 2),
        "no_difference": None if one else {"p": 0.0357, "gap": null, "deviation": null},
        "reference": None,
        "pairs": pairs,
        "adjusted": None,
        "examples": {
            labels[0]: [{"id": "a/1.wav", "errors": 3, "words": 5, "alignment": ALIGNMENT}]
        },
    } | others


ALIGNMENT = [
    ["equal", "turn the", "turn the"],
    ["substitute", "light", "night"],
    ["delete", "off", ""],
    ["equal", "please", "please"],
    ["insert", "", "now"],
]
ADJUSTED = {
    "reference": "female",
    "for": ["duration"],
    "groups": {"male": {"ratio": 1.37, "interval": [1.11, 1.69], "p": 0.0031}},
    "covariates": {"duration": {"ratio": 0.97, "interval": [0.91, 1.03], "p": 0.31}},
    "p": 0.0029,
    "utterances": 999,
    "left_out": 17,
}
CROSSED = {
    "female + adult": 0.0911,
    "female + child": 0.1722,
    "male + adult": 0.1133,
    "male + child": 0.2244,
}
ABOUT = {
    "manifest": "data/x/test.jsonl",
    "model": "finetune/model.pt",
    "synthetic": False,
    "normalization": "basic-1",
    "cluster": "speaker",
    "draws": 10_000,
    "seed": 0,
    "min_speakers": 10,
    "min_utterances": 1,
    "reference": None,
    "empty_references": 2,
    "commit": "abc1234",
    "command": "evaluate.py --by gender gender+age",
    "date": "2026-11-20",
    "bins": ["age=0", "18", "66"],
}
PROBE = {
    "majority": 0.55,
    "chance": 0.5,
    "speakers": 88,
    "groups": {"female": 500, "male": 600},
    "linear": estimate(0.8111),
    "nonlinear": estimate(0.8222),
    "random_init_linear": estimate(0.6333),
    "random_init_nonlinear": estimate(0.6444),
}


def compared(part):
    """Two systems by the groups of one column."""
    return {
        "groups": {label: estimate(0.0171 + 0.01 * i) for i, label in enumerate(part["groups"])},
        "gap_a": estimate(0.0777),
        "gap_b": estimate(0.0555),
        "gap_change": estimate(0.0222, 0.01),
        "pairs": [
            {key: pair[key] for key in ("group", "other", "difference", "p", "p_holm")}
            for pair in part["pairs"]
        ],
    }


def make_report(**others):
    by = {
        "gender": column(
            {"female": 0.1012, "male": 0.1516, "(missing)": 0.2023}, adjusted=ADJUSTED
        ),
        "gender+age": column(CROSSED),
    }
    comparison = {
        "a": "finetune/model.pt",
        "b": "other.jsonl",
        "utterances": 801,
        "overall": estimate(0.0199, 0.003),
        "mapsswe": {"mean": 0.1717, "statistic": 2.58, "p": 0.0099},
        "by": {name: compared(part) for name, part in by.items()},
    }
    return {
        "schema": 1,
        "name": "finetune/model.pt",
        "about": dict(ABOUT),
        "warnings": ["few speakers: 12 of gender=male"],
        "overall": measures(0.1357),
        "by": by,
        "others": [{"name": "other.jsonl", "overall": measures(0.1159), "by": copy.deepcopy(by)}],
        "comparisons": [comparison],
        "leakage": {"model": "pretrained.pt", "n": 1100, "columns": {"gender": PROBE}},
    } | others


# ---- reading the page ----------------------------------------------------------------------------

VOID = {"meta", "br"}


class Page(HTMLParser):
    """The elements of a page; raises where they are not properly nested."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.open, self.pieces = [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, names)
        element = Element(tag, dict(attributes), self.open[-1] if self.open else None)
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        if self.open and self.open[-1].tag not in ("title", "style"):
            self.pieces.append(data)
        for element in self.open:
            element.text += data

    def handle_comment(self, data):
        raise AssertionError(data)

    def all(self, tag, **attributes):
        return [
            e
            for e in self.elements
            if e.tag == tag
            and all(e.attributes.get(name.rstrip("_")) == x for name, x in attributes.items())
        ]

    def text(self):
        return " ".join(self.all("body")[0].text.split())

    def table(self, caption):
        """Rows of cells of the first table so named."""
        of = {e.text: e.parent for e in reversed(self.all("caption"))}[caption]
        rows = [row for row in self.all("tr") if of in row.parents()]
        return [[" ".join(e.text.split()) for e in self.children(row)] for row in rows]

    def children(self, parent):
        return [e for e in self.elements if e.parent is parent]


class Element:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.text = tag, attributes, parent, ""

    def parents(self):
        return [self.parent, *self.parent.parents()] if self.parent else []


def page(**others):
    return Page(to_html(make_report(**others)))


def only(**by):
    """A report of one system with these columns and nothing else."""
    return make_report(by=by, others=[], comparisons=[], leakage=None)


def walk(report, change):
    """A copy with change(key, value) in the place of every value that is no dict or list."""

    def inside(key, x):
        if isinstance(x, dict):
            return {k: inside(k, v) for k, v in x.items()}
        return [inside(key, v) for v in x] if isinstance(x, list | tuple) else change(key, x)

    return inside(None, report)


def unknown(x):
    """A copy in which every number and interval that may be missing is, and tests were not made."""
    if isinstance(x, dict):
        none = ("interval", "no_difference", "leakage", "speakers")
        return {k: None if k in none else unknown(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [unknown(v) for v in x]
    return None if isinstance(x, float) else x


WIDE = only(region=column({f"region {i}": 0.1 + i / 1000 for i in range(200)}))
REPORTS = {
    "two systems": make_report(),
    "no columns": only(),
    "one group": only(gender=column({"female": 0.1})),
    "200 groups": WIDE,
    "above 100 %": only(gender=column({"a": 3.7, "b": 0.2, "c": 0.5})),
    "no errors": only(gender=column({"a": 0.0, "b": 1e-9, "c": 0.0})),
    "long": only(x=column({"y" * 5000: 0.1, "one two " * 500: 0.2, "z": 0.3})),
    "nothing known": unknown(make_report()),
    "not finite": walk(make_report(), lambda _, x: float("nan") if isinstance(x, float) else x),
    "infinite": walk(make_report(), lambda _, x: float("inf") if isinstance(x, float) else x),
}


@pytest.fixture(params=REPORTS)
def report(request):
    return REPORTS[request.param]


# ---- structure -----------------------------------------------------------------------------------


def test_nothing_comes_from_elsewhere_and_nothing_runs(report):
    text = to_html(report)
    parsed = Page(text)
    allowed = {
        "a": {"href", "class"},
        "meta": {"charset", "http-equiv", "content", "name"},
        "style": set(),
    }
    for e in parsed.elements:
        assert e.tag not in {"script", "img", "link", "iframe", "object", "base", "form", "use"}
        assert set(e.attributes) <= allowed.get(e.tag, set(e.attributes))
        assert not [name for name in e.attributes if name.startswith("on") or name == "src"]
        assert e.attributes.get("href", "#").startswith("#")
    policies = [e for e in parsed.elements if e.attributes.get("http-equiv")]
    assert [e.attributes["content"] for e in policies] == [
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    ]
    assert parsed.elements.index(policies[0]) < parsed.elements.index(parsed.all("style")[0])
    assert not re.search(r"url\(|@import|https?:|//", parsed.all("style")[0].text)
    assert "http://" not in text and "https://" not in text


def test_headings_and_links_are_in_order(report):
    parsed = Page(to_html(report))
    levels = [int(e.tag[1]) for e in parsed.elements if re.fullmatch("h[1-6]", e.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(next_ <= level + 1 for level, next_ in zip(levels, levels[1:]))
    ids = [e.attributes["id"] for e in parsed.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    links = parsed.all("a")
    assert links[0].attributes["class"] == "skip"
    assert {e.attributes["href"][1:] for e in links} == set(ids)
    assert [e.attributes["lang"] for e in parsed.all("html")] == ["en"]
    assert parsed.all("title")[0].text.startswith("Fairness report")


def test_every_table_can_be_read_aloud_and_scrolled(report):
    parsed = Page(to_html(report))
    assert parsed.all("table")
    for table in parsed.all("table"):
        caption, head, body = parsed.children(table)
        assert caption.tag == "caption" and caption.text.strip()
        (top,) = parsed.children(head)
        names = parsed.children(top)
        assert {(e.tag, e.attributes["scope"]) for e in names} == {("th", "col")}
        assert all(e.text.strip() for e in names)
        for row in parsed.children(body):
            first, *rest = parsed.children(row)
            assert (first.tag, first.attributes["scope"]) == ("th", "row") and first.text.strip()
            assert {e.tag for e in rest} <= {"td"} and len(rest) == len(names) - 1
        box = table.parent
        assert box.attributes["tabindex"] == "0" and box.attributes["aria-label"] == caption.text


def test_every_drawing_says_what_it_shows(report):
    parsed = Page(to_html(report))
    for drawing in parsed.all("svg"):
        assert drawing.attributes["role"] == "img"
        assert parsed.children(drawing)[0].tag == "title"
        assert parsed.children(drawing)[0].text.strip()
        assert drawing.parent.parent.parent.tag == "figure"
    for figure in parsed.all("figure"):
        assert parsed.children(figure)[0].tag == "figcaption"
    for details in parsed.all("details"):
        assert parsed.children(details)[0].tag == "summary"


def test_everything_drawn_is_inside_its_figure(report):
    parsed, seen = Page(to_html(report)), 0
    for e in parsed.elements:
        for name in {"x", "x1", "x2", "cx", "width"} & set(e.attributes):
            if (place := e.attributes[name]).endswith("%"):
                assert 0 <= float(place[:-1]) <= 100
                seen += 1
    assert seen or not report["by"]


def test_no_python_shows(report):
    text = Page(to_html(report)).text()
    assert not re.search(r"\b(None|nan|inf|True|False|dict|bdi)\b|[{}<]", text.replace("< 0.", ""))


# ---- hostile text --------------------------------------------------------------------------------

NAMES = ("female", "male", "(missing)", "adult", "child", "gender", "age")
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></title></caption></svg><style>*{display:none}</style>",
    "<!-- --> ]]> <![CDATA[ <?php ?>",
    "&lt;b&gt; &amp; &#60;script&#62;",
    "javascript:alert(1) https://example.com/",
    "two\nlines\tand\r\nmore",
    "{report} %s \\ $x `y`",
    "\u202eoverridden\u2069 שלום",
    "\0 \x1b[31m \x7f \x9b \ufffe",
    "\ud800 lone \udfff",
    "x" * 20 + " ",
]


def renamed(report, new):
    """Every text of the report changed; what crossed columns join stays joined."""
    alignment = ("equal", "substitute", "delete", "insert")

    def text(x):
        if x in alignment or not isinstance(x, str):
            return x
        parts = re.split(r"( \+ |\+)", x)
        return "".join(part if part in ("+", " + ", "") else new(part) for part in parts)

    def inside(x, data):
        if isinstance(x, dict):
            keys = {"by", "groups", "covariates", "examples", "columns"}
            return {text(k) if data else k: inside(v, k in keys and not data) for k, v in x.items()}
        return [inside(v, False) for v in x] if isinstance(x, list | tuple) else text(x)

    return inside(report, False)


def skeleton(page):
    """Tags and attributes in order, without the texts."""
    return [
        (e.tag, sorted(e.attributes), [p.tag for p in e.parents()]) for e in Page(page).elements
    ]


def shown(text):
    """As a reader sees it: unprintable characters replaced, white space collapsed."""
    text = "".join("\ufffd" if unprintable(c) else c for c in text)
    return " ".join(text.split())


def unprintable(c):
    code = ord(c)
    control = code < 32 and c not in "\t\n\r" or 0x7F <= code < 0xA0
    return control or 0xD800 <= code < 0xE000 or 0xFDD0 <= code < 0xFDF0 or code in (0xFFFE, 0xFFFF)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_from_the_data_stays_text(hostile):
    report = make_report()
    refused = {"refused": "a reason"}
    report["by"]["gender+age"] |= {"no_difference": refused, "adjusted": refused}
    hostile = hostile.replace("+", "-")
    word = "_".join(hostile.split())  # an alignment is split at white space
    changed = renamed(report, lambda name: f"{hostile}{name}{word}")
    alignment = [
        [kind, *(" ".join(word + x for x in side.split()) for side in sides)]
        for kind, *sides in ALIGNMENT
    ]
    for system in (changed, *changed["others"]):
        for part in system["by"].values():
            for (utterance,) in part["examples"].values():
                utterance["alignment"] = alignment
    page = to_html(changed)
    page.encode("utf-8")
    assert not any(unprintable(c) for c in page)
    assert skeleton(page) == skeleton(to_html(report))
    text = Page(page).text()
    for name in NAMES:
        assert shown(f"{hostile}{name}{word}") in text
    assert shown(f"{word}light") in text


def test_long_texts_are_cut_and_settings_are_not():
    words = " ".join(["word"] * (MANY_WORDS + 45))
    utterance = {"id": "i" * 5000, "errors": 0, "words": 1, "alignment": [["equal", words, words]]}
    part = column({"a": 0.1, "b": 0.2}, examples={"a": [utterance]})
    about = ABOUT | {"command": "c" * 5000}
    parsed = Page(to_html(only(x=part) | {"about": about}))
    assert "… and 45 more words" in parsed.text()
    assert parsed.text().count("word word") < MANY_WORDS + 5
    assert "i" * LONG + " … (5,000 characters)" in parsed.text()
    assert "i" * (LONG + 1) not in parsed.text()
    assert "c" * 5000 in parsed.text()


def test_right_to_left_text_is_set_apart():
    parsed = page()
    for name in parsed.all("bdi"):
        assert name.attributes["dir"] == "auto"
    assert {e.attributes["dir"] for e in parsed.all("p", class_="aligned")} == {"auto"}
    for label in parsed.all("span", class_="label"):
        assert parsed.children(label)[0].tag == "bdi"


# ---- numbers -------------------------------------------------------------------------------------


def test_the_table_of_groups():
    rows = page().table("gender: error rates by group")
    assert rows[1][:3] == ["everyone", "13.57", "10.86 to 16.96"]
    assert rows[2:4] == [
        ["female few", "10.12", "8.10 to 12.65", "5.00", "3.00", "2.10", "4.05", "40.00", "11.13",
         "40", "125", "1,000"],
        ["male", "15.16", "12.13 to 18.95", "7.60", "4.50", "3.10", "6.06", "40.00", "16.68",
         "40", "125", "1,000"],
    ]  # fmt: skip
    assert rows[4][0] == "(missing) left out"


def test_every_number_is_shown():
    """Each number of a report is made different from all others and then looked for."""
    forms = {"p": ".4f", "p_holm": ".4f", "ratio": ".2f", "statistic": ".2f", "mean": "+.4f"}
    wanted, count = [], 0

    def number(key, x, ratio):
        nonlocal count
        if not isinstance(x, float):
            return x
        count += 1
        x = 0.001 + 0.0002 * count
        form = ".2f" if ratio else forms.get(key)
        if key != "observed":  # the gap once more
            wanted.append(format(x, form) if form else f"{100 * x:.2f}")
        return x

    def inside(key, x, ratio=False):
        if isinstance(x, dict):
            return {k: inside(k, v, ratio or k in ("ratio", "adjusted")) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [inside(key, v, ratio) for v in x]
        return number("p" if key == "p" else key, x, ratio and not str(key).startswith("p"))

    pieces = " ".join(Page(to_html(inside(None, make_report()))).pieces)
    found = set(re.findall(r"[+\u2212]?[\d.,]*\d", pieces))
    found |= {x.lstrip("+") for x in found}
    assert count > 250
    assert not set(wanted) - found


def test_crossed_columns_are_a_heat_map():
    rows = page().table("gender by age: WER %, the higher the more colour")
    assert rows == [
        ["gender \\ age", "adult", "child"],
        ["female", "9.11 7.29 to 11.39 best few", "17.22 13.78 to 21.52 worst"],
        ["male", "11.33 9.06 to 14.16", "22.44 17.95 to 28.05 left out"],
    ]
    strengths = [e.attributes["style"] for e in page().all("td", class_="heat")][:4]
    assert strengths == [f"--strength: {0.5 * wer / 0.2244:.2f}" for wer in CROSSED.values()]


def test_a_combination_that_nobody_has_is_an_empty_cell():
    crossed = {label: wer for label, wer in CROSSED.items() if label != "male + adult"}
    rows = Page(to_html(only(**{"gender+age": column(crossed)}))).table(
        "gender by age: WER %, the higher the more colour"
    )
    assert rows[2] == ["male", "none", "22.44 17.95 to 28.05 left out"]


@pytest.mark.parametrize(
    "name, labels",
    [
        ("a+b", ["x", "y"]),  # a column that is called so
        ("a+b", ["x + y + z", "x + y"]),  # a label that holds a plus
        ("a+b+c", ["x + y + z", "x + y + w"]),
        ("a", ["x + y", "x + z"]),
    ],
)
def test_what_is_not_two_columns_crossed_is_no_heat_map(name, labels):
    part = column({label: 0.1 + i / 10 for i, label in enumerate(labels)})
    assert not Page(to_html(only(**{name: part}))).all("td", class_="heat")


def test_many_pairs_are_folded_and_cut():
    few, many = page(), Page(to_html(WIDE))
    caption = "region: each pair of groups, difference in WER"
    assert not [e for e in few.all("summary") if "each pair" in e.text]
    cut = f"{caption}: the {MANY_PAIRS} with the smallest p of 19,701; all in report.json"
    assert len(many.table(cut)) == 1 + MANY_PAIRS
    assert [e.text for e in many.all("summary") if "pair" in e.text] == [cut]
    pairs = WIDE["by"]["region"]["pairs"]
    assert len(pairs) == 19_701
    told = [{**pair, "p": 0.9} for pair in pairs]
    told[-1] = {**told[-1], "p": 0.00002}
    told[5] = {**told[5], "p": None}
    report = only(region=WIDE["by"]["region"] | {"pairs": told})
    rows = Page(to_html(report)).table(cut)
    assert rows[1][:2] == ["region 197", "region 198"] and rows[1][-2] == "< 0.0001"


# ---- figures -------------------------------------------------------------------------------------


def drawings(report, figure=0):
    """Of each row of a figure: its title, and place and class or shape of what is drawn."""
    parsed = Page(to_html(report))
    inside = parsed.all("figure")[figure]
    rows = {}
    for svg in [e for e in parsed.all("svg") if inside in e.parents()]:
        title, *marks = parsed.children(svg)
        rows[" ".join(title.text.split())] = [
            m for m in marks if m.attributes.get("class") != "grid"
        ]
    return rows


def at(element, name):
    return float(element.attributes[name].rstrip("%"))


def test_dots_intervals_and_the_line_of_everyone_lie_where_they_should():
    rows = drawings(make_report())
    titles = [
        "everyone: 13.57 %, 95 % interval 10.86 to 16.96",
        "female: 10.12 %, 95 % interval 8.10 to 12.65",
        "male: 15.16 %, 95 % interval 12.13 to 18.95",
        "(missing): 20.23 %, 95 % interval 16.18 to 25.29",
        "scale from 0 to 30",
    ]
    assert list(rows) == titles
    for title, shape in zip(titles, ("square", "circle", "circle", "hollow")):
        line, reach, dot = rows[title]
        value, low, high = (float(x) / 30 * 100 for x in re.findall(r"\d+\.\d\d", title))
        assert at(line, "x1") == at(line, "x2") == pytest.approx(100 * 13.57 / 30, abs=0.02)
        assert (at(reach, "x1"), at(reach, "x2")) == pytest.approx((low, high), abs=0.02)
        assert at(dot, "cx" if shape == "circle" else "x") == pytest.approx(value, abs=0.02)
        assert shape in (dot.tag, dot.attributes.get("class"))
    ticks = [(e.text, at(e, "x")) for e in rows["scale from 0 to 30"]]
    assert ticks[0] == ("0", 0) and ticks[-1] == ("30", 100)
    grid = [at(e, "x1") for e in page().all("line", class_="grid")][: len(ticks)]
    assert grid == [place for _, place in ticks]
    assert [float(text) / 30 * 100 for text, _ in ticks] == pytest.approx(
        [place for _, place in ticks], abs=0.01
    )


def test_bars_add_up_to_the_word_error_rate():
    rows = drawings(make_report(), figure=1)
    title = "female: substitutions 5.00 %, deletions 3.00 %, insertions 2.10 %"
    marks = [m for m in rows[title] if m.tag == "rect"]
    assert [m.attributes["class"] for m in marks] == ["bar s", "bar d", "bar i"]
    scale = float(next(t for t in rows if t.startswith("scale")).split()[-1])
    ends = [(at(m, "x") + at(m, "width")) * scale / 100 for m in marks]
    assert ends == pytest.approx([5, 8, 10.1], abs=0.02)
    assert [at(m, "x") * scale / 100 for m in marks] == pytest.approx([0, 5, 8], abs=0.02)
    last = rows["(missing): substitutions 10.10 %, deletions 6.00 %, insertions 4.10 %"][-1]
    assert (at(last, "x") + at(last, "width")) * scale / 100 == pytest.approx(20.2, abs=0.02)
    (stripes,) = [m for m in rows[title] if m.tag == "line"]
    assert at(stripes, "x1") == at(marks[1], "x")


def test_rates_above_100_percent_widen_the_figure():
    rows = drawings(REPORTS["above 100 %"])
    assert "scale from 0 to 500" in rows
    reach, dot = rows["a: 370.00 %, 95 % interval 296.00 to 462.50"][1:]
    assert at(dot, "cx") == pytest.approx(74, abs=0.01)
    assert at(reach, "x2") == pytest.approx(92.5, abs=0.01)


def test_an_interval_without_end_does_not_flatten_the_others():
    part = column({"a": 0.1, "b": 0.2, "c": 0.15})
    part["groups"]["a"]["interval"] = [0.001, 1e200]
    rows = drawings(only(x=part))
    reach, beyond, dot = rows["a: 10.00 %, 95 % interval 0.10 to 1.00e+202"][1:]
    assert beyond.text == "›" and at(reach, "x2") == 100 and at(dot, "cx") > 5
    assert "scale from 0 to 30" in rows
    assert "›" not in "".join(m.text for m in rows["b: 20.00 %, 95 % interval 16.00 to 25.00"])


def test_differences_are_drawn_on_both_sides_of_zero():
    report = make_report()
    part = report["comparisons"][0]["by"]["gender"]
    part["groups"] = {"female": estimate(-0.03, 0.01), "male": estimate(0.01, 0.01)}
    rows = drawings(report, figure=8)
    line, reach, dot = rows["female: \u22123.00 points, 95 % interval \u22124.00 to \u22122.00"]
    assert at(dot, "cx") < at(line, "x1")
    line, reach, dot = rows["male: +1.00 points, 95 % interval +0.00 to +2.00"]
    assert at(line, "x1") < at(dot, "cx") and at(reach, "x1") == at(line, "x1")


def test_what_is_not_known_is_said_and_not_drawn():
    part = column({"a": 0.1, "b": 0.2, "c": 0.15})
    nothing = {key: None for key in ("wer", "interval", "cer", "speakers", "speaker_macro_wer")}
    part["groups"]["b"] |= nothing | {"words": 0, "utterance_error_rate": None}
    report = only(x=part)
    row = Page(to_html(report)).table("x: error rates by group")[3]
    assert row == ["b", *["n/a"] * 9, "125", "0"]
    line, mark = drawings(report)["b: n/a %, 95 % interval n/a"]
    assert mark.text == "n/a"
    bars = drawings(report, 1)["b: substitutions n/a %, deletions n/a %, insertions n/a %"]
    assert not bars


# ---- words ---------------------------------------------------------------------------------------


def test_the_summary_comes_first_and_says_it_plainly():
    parsed = page()
    text = parsed.text()
    assert parsed.all("h2")[0].text == "Summary"
    for words in (
        "Over 125 utterances of 40 speakers with 1,000 words, finetune/model.pt has a word error "
        "rate of 13.57 % (10.86 to 16.96).",
        "gender: the word error rate is highest for male, 15.16 % (12.13 to 18.95), and lowest for "
        "female, 10.12 % (8.10 to 12.65). The gap is 5.04 points (3.04 to 7.04), the ratio 1.50 "
        "(1.30 to 1.70). If labels meant nothing, a gap of 2.11 points would still be expected, "
        "and one above 4.33 in 5 % of cases. Test of no difference between the groups: p = 0.0357; "
        "differences like these are seldom chance alone.",
        "the gap of A is 7.77 points, that of B 5.55. A minus B: +2.22 (+1.22 to +3.22); the "
        "disparity is smaller with B.",
        "few speakers: 12 of gender=male",
    ):
        assert words.lower() in text.lower()
        assert text.lower().index(words.lower()) < text.index("By group: finetune", 400)


@pytest.mark.parametrize(
    "test, words",
    [
        (0.0501, "p = 0.0501; these data fit chance alone; that does not show that the groups"),
        (0.05, "p = 0.0500; differences like these are seldom chance alone"),
        (0.00009999, "p < 0.0001; differences like these"),
        (None, "Not tested against chance."),
        ("the label varies within 3 clusters", "Not tested against chance: the label varies"),
    ],
)
def test_what_chance_alone_would_do(test, words):
    part = column({"a": 0.1, "b": 0.2, "c": 0.3})
    if isinstance(test, float):
        part["no_difference"]["p"] = test
    else:
        part["no_difference"] = {"refused": test} if test else None
    assert words in Page(to_html(only(x=part))).text()


@pytest.mark.parametrize(
    "interval, words",
    [
        ([0.001, 0.04], "the disparity is smaller with B"),
        ([-0.04, -0.001], "the disparity is larger with B"),
        ([-0.001, 0.04], "these data do not tell whether the disparity changed"),
        (None, "how sure that is, the data cannot tell"),
    ],
)
def test_did_the_disparity_shrink(interval, words):
    report = make_report()
    for part in report["comparisons"][0]["by"].values():
        part["gap_change"] = {"value": 0.0222, "interval": interval}
    text = Page(to_html(report)).text()
    assert text.count(words) == 4  # two columns, in the summary and where they are compared


@pytest.mark.parametrize(
    "interval, words",
    [
        ([0.001, 0.04], "points (+0.10 to +4.00): B errs less."),
        ([-0.04, -0.001], ": A errs less."),
        ([-0.01, 0.04], ": which of them errs less, these data do not tell."),
        (None, "(n/a): how sure that is, the data cannot tell."),
    ],
)
def test_which_system_errs_less(interval, words):
    report = make_report()
    report["comparisons"][0]["overall"] = {"value": 0.01, "interval": interval}
    text = Page(to_html(report)).text()
    assert words in text
    assert "On the 801 utterances that all systems have" in text
    assert "+0.1717 errors an utterance, statistic 2.58, p = 0.0099." in text


def test_only_sections_with_something_to_say_are_there():
    def titles(report):
        return [e.text for e in Page(to_html(report)).all("h2")]

    first, second = "By group: finetune/model.pt", "By group: other.jsonl"
    last = ["Systems compared", "Leakage beside word error rates", "Method and limits"]
    assert titles(make_report()) == ["Summary", first, second, *last]
    assert titles(only()) == ["Summary", "Method and limits"]


def test_synthetic_speech_is_called_so_before_anything_else():
    synthetic = page(about=ABOUT | {"synthetic": True}).text()
    assert 0 < synthetic.index("SYNTHETIC SPEECH") < synthetic.index("Over 125 utterances")
    assert "SYNTHETIC" not in page().text()


def test_differing_words_are_marked_by_more_than_colour():
    parsed = page()
    first = parsed.all("p", class_="aligned")[0]
    inside = [e for e in parsed.elements if first in e.parents()]
    assert [e.text for e in inside if e.tag == "s"] == ["light", "off"]
    assert [e.text for e in inside if e.tag == "u"] == ["night", "now"]
    heard = [
        e for e in inside if e.attributes.get("class", "").startswith("word")
    ]  # by one who cannot see: what is hidden from them taken out
    silent = [e.text for e in inside if e.attributes.get("aria-hidden")]
    assert silent == ["turn", "the", "please"]
    assert [" ".join(e.text.split()) for e in heard] == [
        "turnturn", "thethe", "light (recognised as) night", "off (left out)", "pleaseplease",
        "now (added)",
    ]  # fmt: skip


def test_leakage_stands_beside_the_gap_and_is_no_proxy():
    parsed = page()
    assert parsed.table("gender: leakage beside the gap")[1:] == [
        ["linear probe", "81.11", "79.11 to 83.11"],
        ["linear probe, untrained encoder", "63.33", "61.33 to 65.33"],
        ["nonlinear probe", "82.22", "80.22 to 84.22"],
        ["nonlinear probe, untrained encoder", "64.44", "62.44 to 66.44"],
        ["chance", "50.00", "–"],
        ["share of the largest group", "55.00", "–"],
        ["gap in word error rates, points", "5.04", "3.04 to 7.04"],
    ]
    assert "Neither leakage nor a gap in word error rates is a proxy" in parsed.text()
    shapes = [marks[-1].tag for title, marks in drawings(make_report(), -1).items()]
    assert shapes == ["circle", "rect", "circle", "rect", "text"]  # rect: untrained
    other = {"model": "x", "n": None, "columns": {"accent": {**PROBE, "linear": NOTHING}}}
    rows = page(leakage=other).table("accent: leakage beside the gap")
    assert rows[1] == ["linear probe", "n/a", "n/a"]
    assert rows[-1] == ["gap in word error rates, points", "n/a", "n/a"]
    assert "proxy" not in page(leakage=None).text()


def test_settings_and_limits_are_all_there():
    parsed = page()
    rows = dict(parsed.table("What the numbers rest on")[1:])
    assert set(rows) == {*ABOUT, "schema of report.json"}
    assert rows["draws"] == "10000" and rows["synthetic"] == "no" and rows["reference"] == "none"
    assert rows["commit"] == "abc1234" and rows["bins"] == "age=0, 18, 66"
    for words in (
        "A group label is not a cause",
        "is not evidence of no difference",
        "Leakage is a lower bound",
        "10,000 draws of whole clusters (here: speaker)",
    ):
        assert words in parsed.text()


def test_adjusted_ratios_or_why_there_are_none():
    rows = page().table("gender: ratios of error rates to female with duration held fixed")
    assert rows[1:] == [
        ["male", "1.37", "1.11 to 1.69", "0.0031"],
        ["held fixed: duration", "0.97", "0.91 to 1.03", "0.3100"],
    ]
    refused = column({"a": 0.1, "b": 0.2}, adjusted={"refused": "too few clusters"})
    assert "No adjusted ratios: too few clusters." in Page(to_html(only(x=refused))).text()


# ---- colours -------------------------------------------------------------------------------------


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def rgb(text):
    if not text.startswith("#"):
        return [int(c) / 255 for c in text.split()]
    digits = text[1:] if len(text) == 7 else "".join(2 * c for c in text[1:])
    return [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]


def test_text_stands_out_in_light_dark_and_print():
    """Contrast of 4.5 at least, as the guidelines for accessible content (WCAG 2.2, AA) ask."""
    style = page().all("style")[0].text
    schemes = [
        {k: rgb(v) for k, v in re.findall(r"--(\w+): ([^;]+);", block)}
        for block in re.findall(r":root {(.*?)}", style, re.DOTALL)
    ]
    assert len(schemes) == 3
    for scheme in schemes:
        for name in ("ink", "soft", "accent", "loud"):
            assert contrast(scheme[name], scheme["paper"]) >= 4.5, name
        hottest = [(a + b) / 2 for a, b in zip(scheme["heat"], scheme["paper"])]
        assert contrast(scheme["ink"], hottest) >= 4.5
