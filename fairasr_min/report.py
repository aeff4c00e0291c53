"""The fairness report: what is counted, by whom, how sure it is, and how it is shown. No torch.

make_report() returns plain data; the terminal's tables, Markdown, CSV and HTML (report_html.py)
show what stands in there and nothing else. README.md ("The report") describes its fields.
"""

import csv
import io
import sys
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from fairasr_min import stats
from fairasr_min.text import printable
from fairasr_min.wer import Errors, align, count_errors

SCHEMA = 1
MISSING = "(missing)"
FEW = 10  # speakers below which an interval deserves less trust
EXAMPLES = 5  # utterances shown of each group
SHOWN = 10  # pairs of groups in one summary


def make_report(
    references: Sequence[str],
    hypotheses: dict[str, Sequence[str]],
    groups: dict[str, Sequence[str | None]],
    about: dict,
    *,
    clusters: Sequence[Hashable] | None = None,
    ids: Sequence[str] | None = None,
    reference: str | None = None,
    min_speakers: int = 1,
    min_utterances: int = 1,
    covariates: dict[str, Sequence] | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> dict:
    """The report on one system, or on several that heard the same utterances, as plain data.

    references, and the hypotheses of each system by its name: one normalised text an utterance.
    groups: each column's label of each utterance, None for missing. about: what the numbers rest
    on, copied. clusters: the speaker of each utterance; None: every utterance is its own. ids: what
    the utterances are called in the examples. reference: the group that others are held against.
    Groups of fewer speakers or utterances than asked for are shown, and left out of comparisons.
    covariates: columns to hold fixed (stats.adjust). Raises stats.StatisticsError for a reference
    that is in no column.
    """
    if reference is not None and not any(reference in labels for labels in groups.values()):
        raise stats.StatisticsError(f"no column has a group {reference!r} to refer to")
    if not references:
        raise stats.StatisticsError("no utterance is left to count")
    groups = {
        column: [None if label == MISSING else label for label in labels]
        for column, labels in groups.items()
    }
    speakers = list(range(len(references))) if clusters is None else list(clusters)
    sampling = {"draws": draws, "seed": seed}
    warnings, systems, counted = [], [], {}
    for name, texts in hypotheses.items():
        errors = np.array([count_errors(r, h) for r, h in zip(references, texts, strict=True)])
        table = dict(zip(Errors._fields, errors.T))
        table["errors"] = table["substitutions"] + table["deletions"] + table["insertions"]
        counted[name] = table
        by = {}
        for column, labels in groups.items():
            keep = stats.large_enough(speakers, labels, min_speakers, min_utterances)
            part = _column(table, speakers, labels, keep, reference, covariates, sampling)
            part["groups"] = _groups(table, labels, clusters, part, keep)
            part["examples"] = _examples(table, references, texts, labels, ids)
            by[column] = part
        everyone = np.arange(len(references))
        labels = [None] * len(references)
        overall = stats.rates_by_group(
            table["errors"], table["words"], speakers, labels, **sampling
        )
        measures = _measures(table, everyone, clusters, plain(overall.overall)["interval"])
        systems.append({"name": name, "overall": measures, "by": by})

    for column, part in systems[0]["by"].items():
        if reference in part["groups"] and part["reference"] is None:
            warnings.append(f"{column}: {reference} is too small to refer to")
        few = [label for label, g in part["groups"].items() if g["few_clusters"]]
        if few:
            warnings.append(f"{column}: fewer than {FEW} speakers in {', '.join(few)}; no interval "
                            "or test of so few deserves much trust")  # fmt: skip
        left = [k for k, g in part["groups"].items() if not g["compared"] and k != MISSING]
        if left:
            warnings.append(f"{column}: left out of gaps, as too small: {', '.join(left)}")
    first, *others = systems
    comparisons = [
        _comparison(first["name"], other["name"], counted, speakers, groups,
                    (min_speakers, min_utterances), sampling)
        for other in others
    ]  # fmt: skip
    return {
        "schema": SCHEMA,
        "name": first["name"],
        "about": about,
        "warnings": warnings,
        "overall": first["overall"],
        "by": first["by"],
        "others": others,
        "comparisons": comparisons,
        "leakage": None,
    }


def plain(x):
    """Results of stats.py as dicts and lists."""
    if isinstance(x, stats.Interval):
        return list(x)
    if hasattr(x, "_asdict"):
        return {name: plain(value) for name, value in x._asdict().items()}
    if isinstance(x, dict):
        return {MISSING if key is None else key: plain(value) for key, value in x.items()}
    return [plain(one) for one in x] if isinstance(x, list) else x


# ---- one column of one system --------------------------------------------------------------------


def _column(table, speakers, labels, keep, reference, covariates, sampling) -> dict:
    """Disparity, test and pairs between the groups of one column."""
    counts = (table["errors"], table["words"], speakers, labels)
    compared = {label for label, n in zip(labels, table["words"]) if n} & set(keep)
    given = reference if reference in compared else None
    rates = stats.rates_by_group(*counts, keep, given, **sampling)
    try:
        no_difference = plain(stats.permutation_test(*counts, keep, **sampling))
    except stats.StatisticsError as error:
        no_difference = {"refused": str(error)}
    adjusted = None
    if covariates:
        try:
            adjusted = {**plain(stats.adjust(*counts, covariates, keep, given)),
                        "for": list(covariates)}  # fmt: skip
        except stats.StatisticsError as error:
            adjusted = {"refused": str(error)}
    of = {label: estimate.value for label, estimate in rates.groups.items() if label in compared}
    worst = max(of, key=of.get) if len(of) > 1 else None
    best = min(of, key=of.get) if len(of) > 1 else None
    relative = (of[worst] - of[best]) / of[best] if best is not None and of[best] else None
    return {
        "rates": rates.groups,
        "macro": plain(rates.macro),
        "worst": worst,
        "best": best,
        "gap": plain(rates.gap),
        "ratio": _ratio(rates.pairs, worst, best, of),
        "relative_gap": relative,
        "deviation": plain(rates.deviation),
        "no_difference": no_difference,
        "reference": given,
        "pairs": plain(rates.pairs),
        "adjusted": adjusted,
    }


def _ratio(pairs, worst, best, of) -> dict:
    """Worst rate over best; its interval only if that pair is among those estimated."""
    for pair in pairs:
        ratio = plain(pair.ratio)
        if (pair.group, pair.other) == (worst, best):
            return ratio
        if (pair.other, pair.group) == (worst, best) and ratio["value"]:
            interval = ratio["interval"] and [1 / x for x in reversed(ratio["interval"])]
            return {"value": 1 / ratio["value"], "interval": interval}
    value = of[worst] / of[best] if worst is not None and of[best] else None
    return {"value": value, "interval": None}


def _groups(table, labels, clusters, part, keep) -> dict:
    """Measures of each group, by label; the unlabelled last."""
    rows: dict[str | None, list[int]] = {}
    for i, label in enumerate(labels):
        rows.setdefault(label, []).append(i)
    groups = {}
    for label, estimate in part.pop("rates").items():
        measures = _measures(table, np.array(rows[label]), clusters, plain(estimate)["interval"])
        measures["compared"] = label in keep and measures["words"] > 0
        few = measures["speakers"] is not None and measures["speakers"] < FEW
        groups[MISSING if label is None else label] = {**measures, "few_clusters": few}
    return groups


def _measures(table, rows, clusters, interval) -> dict:
    """Counts of some utterances and the rates that follow; None where nothing is to divide by."""
    sums = {name: int(table[name][rows].sum()) for name in Errors._fields}
    errors, words = table["errors"][rows], table["words"][rows]
    speakers = macro = None
    if clusters is not None:
        names = {}
        place = [names.setdefault(clusters[i], len(names)) for i in rows]
        speakers = len(names)
        spoken = np.bincount(place, words)
        wrong = np.bincount(place, errors)[spoken > 0]
        macro = float(np.mean(wrong / spoken[spoken > 0])) if len(wrong) else None

    def rate(n, of):
        return int(n) / of if of else None

    return {
        **sums,
        "speakers": speakers,
        "wer": rate(errors.sum(), sums["words"]),
        "interval": interval,
        "cer": rate(sums["character_errors"], sums["characters"]),
        "utterance_error_rate": rate(sums["wrong_utterances"], sums["utterances"]),
        "speaker_macro_wer": macro,
    }


def _examples(table, references, texts, labels, ids) -> dict:
    """The utterances with the most errors of each group, word by word."""
    worst, seen = {}, {}
    for i in np.argsort(-table["errors"], kind="stable"):
        label = labels[i]
        if label is None or table["errors"][i] == 0 or seen.get(label, 0) == EXAMPLES:
            continue
        seen[label] = seen.get(label, 0) + 1
        worst.setdefault(label, []).append({
            "id": str(ids[i]) if ids is not None else f"utterance {i + 1}",
            "errors": int(table["errors"][i]),
            "words": int(table["words"][i]),
            "alignment": [list(step) for step in align(references[i], texts[i])],
        })  # fmt: skip
    return {label: worst[label] for label in sorted(worst)}


def _comparison(a, b, counted, speakers, groups, least, sampling) -> dict:
    """System A against B on the same utterances."""
    errors, words = (counted[a]["errors"], counted[b]["errors"]), counted[a]["words"]
    everyone = stats.compare(*errors, words, speakers, [None] * len(words), **sampling)
    by = {}
    for column, labels in groups.items():
        keep = stats.large_enough(speakers, labels, *least)
        part = plain(stats.compare(*errors, words, speakers, labels, keep, **sampling))
        del part["overall"]
        by[column] = part
    return {
        "a": a,
        "b": b,
        "utterances": len(words),
        "overall": plain(everyone.overall),
        "mapsswe": plain(stats.mapsswe(*errors)),
        "by": by,
    }


# ---- for people to read --------------------------------------------------------------------------

HEADER = ["", "WER %", "95 %", "speakers", "utterances", "words", "S", "D", "I"]


def percent(fraction: float | None) -> str:
    return "n/a" if fraction is None else f"{100 * fraction:.2f}"


def between(interval: list | None) -> str:
    return "n/a" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}"


def _cells(name: str, c: dict) -> list[str]:
    names = ("utterances", "words", "substitutions", "deletions", "insertions")
    speakers = "n/a" if c["speakers"] is None else f"{c['speakers']:,}"
    counts = (f"{c[n]:,}" for n in names)
    return [name, percent(c["wer"]), between(c["interval"]), speakers, *counts]


def _summary(part: dict) -> list[str]:
    """Gap, ratio, and what chance alone would do, in sentences."""
    if part["worst"] is None:
        return ["fewer than two groups to compare; no gap"]
    if part["worst"] == part["best"]:
        return ["all groups have the same word error rate"]
    ratio = part["ratio"]["value"]
    lines = [
        f"worst {part['worst']}, best {part['best']}: gap {percent(part['gap']['value'])} points "
        f"(95 %: {between(part['gap']['interval'])}), "
        f"ratio {'n/a' if ratio is None else f'{ratio:.2f}'}"
    ]
    test = part["no_difference"]
    if test and "refused" in test:
        lines.append(test["refused"])
    elif test:
        null = test["gap"]
        lines.append(
            f"if the groups did not differ, the gap would be {percent(null['expected'])} points on "
            f"average, below {percent(null['percentile_95'])} in 95 % of cases; p = {test['p']:.2g}"
        )
    found = [pair for pair in part["pairs"] if (pair["p_holm"] or 1) <= 0.05]
    for pair in found[:SHOWN]:
        lines.append(
            f"{pair['group']} against {pair['other']}: {percent(pair['difference']['value'])} "
            f"points (95 %: {between(pair['difference']['interval'])}), p = {pair['p_holm']:.2g}"
        )
    if found and len(part["pairs"]) > 1:
        more = f"{len(found) - SHOWN} more in report.json; " if len(found) > SHOWN else ""
        lines.append(f"({more}p of pairs after Holm's correction for {len(part['pairs'])} pairs)")
    adjusted = part["adjusted"] or {}
    if "refused" in adjusted:
        lines.append(f"not adjusted: {adjusted['refused']}")
    for label, r in adjusted.get("groups", {}).items():
        low, high = r["interval"]
        lines.append(
            f"with {', '.join(adjusted['for'])} held fixed, {label} against "
            f"{adjusted['reference']}: {r['ratio']:.2f} times the errors (95 %: {low:.2f} to "
            f"{high:.2f}), p = {r['p']:.2g}"
        )
    return lines


def _comparison_lines(c: dict, column: str | None) -> list[str]:
    """A - B of everyone, or of a column's groups and gap."""
    parts = {"all": c["overall"]} if column is None else c["by"][column]["groups"]
    lines = [f"{c['a']} - {c['b']}, points of WER (above 0: {c['b']} errs less)"]
    lines += [f"  {name}: {percent(e['value'])} (95 %: {between(e['interval'])})"
              for name, e in parts.items()]  # fmt: skip
    if column is None and c["mapsswe"]["p"] is not None:
        statistic, p = c["mapsswe"]["statistic"], c["mapsswe"]["p"]
        lines.append(
            f"  MAPSSWE, which takes utterances to be independent: {statistic:.2f}, p = {p:.2g}"
        )
    if column is not None and c["by"][column]["gap_change"]["value"] is not None:
        change = c["by"][column]["gap_change"]
        low, high = change["interval"] or (None, None)
        verdict = "no telling whether the disparity changed"
        if low is not None and (low > 0 or high < 0):
            verdict = f"the disparity is {'smaller' if low > 0 else 'larger'} in {c['b']}"
        lines.append(
            f"  gap of {c['a']} - gap of {c['b']}: {percent(change['value'])} "
            f"(95 %: {between(change['interval'])}); {verdict}"
        )
    return lines


def _leakage_lines(report: dict) -> list[str]:
    """What a probe reads from the embeddings beside the gap, of each column."""
    lines = []
    for column, found in (report["leakage"] or {"columns": {}})["columns"].items():
        probes = []
        for name in ("linear", "nonlinear", "random_init_linear"):
            if found.get(name):
                score = f"{percent(found[name]['value'])} ({between(found[name]['interval'])})"
                probes.append(f"{name.replace('_', ' ')} {score}")
        gap = report["by"].get(column, {}).get("gap", {}).get("value")
        lines.append(
            f"{column}: balanced accuracy on unseen speakers, %: {', '.join(probes)}; chance "
            f"{percent(found['chance'])}"
            + ("" if gap is None else f". Gap in word error rates: {percent(gap)} points")
        )
    if lines:
        lines.append("Leakage is no proxy for gaps in word error rates, nor are they for leakage.")
    return lines


def _tables(report: dict):
    """(system, column, rows of cells, sentences) for each; the first row is everyone."""
    for system in [report, *report["others"]]:
        overall = _cells("all", system["overall"])
        for column, part in system["by"].items():
            rows = [
                _cells(name + ("" if g["compared"] or name == MISSING else " *"), g)
                for name, g in part["groups"].items()
            ]
            yield system["name"], column, [overall, *rows], _summary(part)
        if not system["by"]:
            yield system["name"], "", [overall], []


def to_text(report: dict) -> str:
    """Aligned tables for a terminal."""
    lines = _notes(report)
    for name, column, rows, sentences in _tables(report):
        rows = [[column, *HEADER[1:]], *rows]
        widths = [max(map(len, cells)) for cells in zip(*rows)]
        lines += ["", name] if report["others"] else [""]
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
            lines.append("  ".join(cells))
        lines += sentences
    for c in report["comparisons"]:
        for column in [None, *c["by"]]:
            lines += ["", *([column] if column else []), *_comparison_lines(c, column)]
    if leakage := _leakage_lines(report):
        lines += ["", "leakage", *leakage]
    lines += [f"warning: {w}" for w in report["warnings"]]
    return "\n".join(map(printable, lines))


def to_markdown(report: dict) -> str:
    """The same tables as Markdown, with what they rest on."""
    lines = ["# Word error rate by group", "", *(f"{escape(note)}  " for note in _notes(report))]
    lines += [f"warning: {escape(w)}  " for w in report["warnings"]]
    lines += _markdown_tables(report)
    for c in report["comparisons"]:
        for column in [None, *c["by"]]:
            title = f"{c['a']} against {c['b']}: {column or 'all'}"
            lines += ["", f"## {escape(title)}", ""]
            lines += [f"{escape(line)}  " for line in _comparison_lines(c, column)]
    if leakage := _leakage_lines(report):
        lines += ["", "## Leakage", "", *(f"{escape(line)}  " for line in leakage)]
    lines += ["", "## What the numbers rest on", ""]
    lines += [f"- {escape(f'{name}: {value}')}" for name, value in report["about"].items()]
    return "\n".join(lines) + "\n"


def _markdown_tables(report: dict) -> list[str]:
    lines = []
    for name, column, rows, sentences in _tables(report):
        title = f"{name}: {column or 'all'}" if report["others"] else column or "all"
        lines += ["", f"## {escape(title)}", ""]
        lines.append("| " + " | ".join([escape(column or "group"), *HEADER[1:]]) + " |")
        lines.append("|---" + "|---:" * (len(HEADER) - 1) + "|")
        lines += ["| " + " | ".join(map(escape, row)) + " |" for row in rows]
        lines += ["", *(f"{escape(sentence)}  " for sentence in sentences)] if sentences else []
    return lines


CARD = "<!-- written by fairasr_min, and again whenever the model is evaluated -->"


def write_model_card(folder: Path, model: dict, report: dict | None = None) -> None:
    """MODEL_CARD.md beside the model file; not over one that somebody else wrote."""
    card = folder / "MODEL_CARD.md"
    try:
        if card.exists() and not card.read_bytes().startswith(CARD.encode()):
            return
        unfinished = folder / f".{card.name}.unfinished"
        unfinished.write_text(to_model_card(model, report), encoding="utf-8")
        unfinished.replace(card)
    except OSError as error:
        print(f"warning: {card} could not be written ({error.strerror})", file=sys.stderr)


def to_model_card(model: dict, report: dict | None = None) -> str:
    """MODEL_CARD.md: what a model file of stage 2 was trained on, how, and, once it was evaluated,
    the groups' word error rates (the idea: Mitchell et al. 2019, arXiv:1810.03993).

    model: what finetune.py writes into the file, without weights.
    """
    trained, stage1 = model["training"], model["stage1"] or {}
    hidden = ", ".join(model["labels"]) or "nothing"
    lines = [CARD, "# Model card", ""]
    if model["synthetic"]:
        lines += ["**Trained on SYNTHETIC voices: a demonstration, not for use with people.**", ""]
    lines += [
        f"A Conformer-CTC speech recogniser, {model['config']['d_model']} wide, "
        f"{model['config']['n_layers']} layers, written by fairasr_min (commit {model['commit']}).",
        "",
        f"- Stage 1 trained its encoder to hide: {escape(hidden)}. That does not make the model "
        "fair or its embeddings anonymous; what follows is what was measured.",
        f"- The checkpoint is that of step {model['step']}, chosen on the dev set: "
        + (", ".join(f"{k} {v:.4g}" for k, v in model["dev"].items()) or "none was looked at"),
        "",
        "## Training data",
        "",
        f"{escape(str(trained['manifest']))} (SHA-256 {trained['sha256']}), "
        f"{trained['utterances']:,} utterances, {trained['hours']:.2f} hours.",
    ]
    for column, groups in trained["groups"].items():
        lines += ["", f"| {escape(column)} | utterances | hours |", "|---|---:|---:|"]
        lines += [f"| {escape(k)} | {g['utterances']:,} | {g['hours']:.2f} |"
                  for k, g in groups.items()]  # fmt: skip
    for title, settings in (("stage 1", stage1), ("stage 2", model["arguments"])):
        lines += ["", f"## Settings of {title}", ""]
        lines += [f"- {escape(f'{k}: {v}')}" for k, v in settings.items()] or ["It had none."]
    lines += ["", "## Word error rate by group", ""]
    if report is None:
        return "\n".join([*lines, "Not evaluated yet (evaluate.py adds it here).", ""])
    lines += [f"On {escape(str(report['about']['manifest']))}, {report['about']['date']}.", ""]
    lines += [f"{escape(w)}  " for w in report["warnings"]]
    return "\n".join([*lines, *_markdown_tables(report)]) + "\n"


def _notes(report: dict) -> list[str]:
    about = report["about"]
    corpus = "SYNTHETIC speech" if about.get("synthetic") else "speech"
    notes = [f"{corpus}: {about['manifest']}", f"recognised by: {about['model']}"]
    if about.get("synthetic"):
        notes.append("Synthetic voices: these numbers say nothing about people.")
    notes.append("WER = (S + D + I) / words of the reference, counted over all of a group's words.")
    if "normalization" in about:
        notes.append(
            f"Both texts normalised: {about['normalization']}. Intervals and tests resample each "
            f"{about['cluster']} as a whole."
        )
    if any(not g["compared"] and name != MISSING
           for part in report["by"].values() for name, g in part["groups"].items()):  # fmt: skip
        notes.append("* too small, or without words: shown, but left out of gaps and tests")
    return notes


def escape(text: str) -> str:
    """For Markdown."""
    text = " ".join(text.splitlines())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def to_csv(report: dict) -> str:
    """One row for each system, column and group; the first of each system is everyone."""
    file = io.StringIO()
    writer = None
    for system in [report, *report["others"]]:
        parts = [("", "all", system["overall"])]
        for column, part in system["by"].items():
            parts += [(column, label, group) for label, group in part["groups"].items()]
        for column, label, measures in parts:
            low, high = measures["interval"] or (None, None)
            row = {"system": system["name"], "column": column, "group": label, **measures}
            del row["interval"]
            row |= {"wer_low": low, "wer_high": high, "compared": measures.get("compared", True)}
            row |= {"few_clusters": measures.get("few_clusters", False)}
            if writer is None:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
            writer.writerow(row)
    return file.getvalue()
