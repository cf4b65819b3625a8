"""Reports of commands, as text and as JSON.

Functions named `*_summary` return the content of a JSON report. Functions named `print_*` and `*_lines` give the same
report as text.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from taskvec_formats import ModelFolder
from taskvec_formats.file_names import INDEX
from taskvec_formats.text import json_text, printable

from . import streams

if TYPE_CHECKING:
    from taskvec import Applied, Checkpoint, TaskVector
    from taskvec.analysis.overlap import Overlap
    from taskvec.demo.run import Demo
    from taskvec.evaluation.evaluate import Evaluation
    from taskvec.evaluation.variants import Variant
    from taskvec.hub.push import Pushed
    from taskvec.search.search import SearchResult
    from taskvec.training.plan import Plan
    from taskvec.training.preview import Preview

_LINE, _CELL = 4000, 200  # maximum number of characters in a line, and in a cell of a table
_GENERATIONS = 8  # of parents that are printed
_ROWS = 200  # maximum number of rows in a table


def size(count: float) -> str:
    """Format a number of bytes with a decimal unit, such as 1.2 MB (10^6 bytes)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def say(line: str, *, err: bool = False) -> None:
    """Print one line, with control characters escaped, since names and texts may come from untrusted files.

    Args:
        line: The line; it is cut to 4,000 characters.
        err: Whether to print to standard error.
    """
    typer.echo(printable(line, _LINE), err=err)


def print_json(document: Any) -> None:
    """Print one JSON document to standard output."""
    typer.echo(json_text(document))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table to standard output.

    Off a terminal it is as wide as its content. At most 200 rows are printed.

    Args:
        columns: The headers. The first column is aligned to the left, the others to the right.
        rows: The cells of each row.
        title: A title above the table.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        # names may be long: they are folded before a number is cut off
        table.add_column(
            column, justify="left" if number == 0 else "right", no_wrap=number > 0, overflow="fold", vertical="bottom"
        )
    for row in rows[:_ROWS]:
        # rich would parse a string as markup
        table.add_row(*(Text(printable(cell, _CELL)) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000
    with console.capture() as text:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in text.get().splitlines()))
    if len(rows) > _ROWS:
        say(f"  and {len(rows) - _ROWS:,} more rows; --json prints all of them")


def file_summary(path: str, vector: TaskVector) -> dict[str, Any]:
    """Return what `inspect --json` prints for one file.

    Args:
        path: The path of the file, as it was given.
        vector: The opened file.
    """
    summary = vector.summary()
    entries, file_size = summary["entries"], vector.file_size
    assert file_size is not None
    size = {"bytes": file_size, "bits_per_entry": 8 * file_size / entries if entries else None}
    return {"path": path, **summary, **size}


def report_file(output: Path, as_json: bool, **more: object) -> None:
    """Print the report on a `.lota` file that was just written.

    Args:
        output: The file.
        as_json: Whether to print JSON.
        more: Further facts for the report, in this order.
    """
    from taskvec import TaskVector

    vector = TaskVector.open(output)
    summary = file_summary(str(output), vector)
    if as_json:
        print_json({**{key: value for key, value in summary.items() if key != "tensors"}, **more})
        return
    streams.need_no_reader()
    say(f"{output}: {_totals(summary)}")
    if other := _other_tensors(vector):
        say(f"tensors {other}" + ("; such a vector cannot be merged" if vector.kind == "vector" else ""))
    if summary["not_carried"]:
        say(not_carried(summary["not_carried"]))
    print_more(more)


def _other_tensors(vector: TaskVector) -> str:
    """Return how many tensors a vector adds, removes and changes to a form whose deltas cannot be added, if any."""
    from taskvec.vectors.promotion import is_widened

    added = sum(spec.origin is None for spec in vector.specs.values())
    counts = {
        "added": added,
        "removed": len(vector.header.removed),
        "of another shape or dtype": sum(not is_widened(spec) for spec in vector.specs.values()) - added,
    }
    return ", ".join(f"{what}: {count}" for what, count in counts.items() if count)


def _totals(summary: dict[str, Any]) -> str:
    """Return the number of entries, their density, the number of replacements if there are any, and the file size."""
    # the entries of a patch are its replacements
    replaced = summary["replaced"] if summary["kind"] == "vector" else 0
    return (
        f"{summary['entries']:,} entries of {summary['eligible']:,} eligible weights "
        f"(density {summary['density']:.2%}), {f'{replaced:,} replacements, ' if replaced else ''}"
        f"{size(summary['bytes'])}"
    )


def push_summary(vector: Path, pushed: Pushed) -> dict[str, Any]:
    """Return what `push --json` prints.

    Args:
        vector: The file that was uploaded.
        pushed: The upload.
    """
    return {"path": str(vector), **asdict(pushed)}


def base_summary(base: Checkpoint) -> dict[str, str | None]:
    """Return what `unpack --json` prints for the base: its name, and the commit if it came from the Hub."""
    return {"name": base.name, "revision": None if base.commit is None else base.commit.revision}


def base_text(base: Checkpoint) -> str:
    """Return the name of a base with the beginning of the commit that it was downloaded at."""
    return base.name if base.commit is None else f"{base.name}@{base.commit.revision[:12]}"


def report_folder(output: Path, as_json: bool, **more: object) -> None:
    """Print the report on a model folder that was just written.

    Args:
        output: The folder.
        as_json: Whether to print JSON.
        more: Further facts for the report, in this order.
    """
    written = ModelFolder(output)
    total = sum(shard.path.stat().st_size for shard in written.shards)
    if as_json:
        counts = {"tensors": len(written.tensors), "files": len(written.shards), "bytes": total}
        print_json({"path": str(output), **counts, **more})
        return
    streams.need_no_reader()
    say(f"{output}: {len(written.tensors)} tensors in {len(written.shards)} file(s), {size(total)}")
    print_more(more)


def print_more(more: dict[str, object]) -> None:
    """Print one line per fact; underscores in its key become spaces."""
    for key, value in more.items():
        shown = f"{value:.3f}" if isinstance(value, float) else value
        say(f"{key.replace('_', ' ')}: {shown}")


def plan_summary(plan: Plan, files: Sequence[str], folders: Sequence[str]) -> dict[str, Any]:
    """Return what `train --dry-run --json` prints.

    Args:
        plan: The plan of the run.
        files: The files that the run would write.
        folders: The folders that it would use: OUTPUT.run during the run, and that of `--report-to`, if any.
    """
    return {**asdict(plan), "files": list(files), "folders": list(folders)}


def print_plan(plan: Plan, files: Sequence[str], folders: Sequence[str]) -> None:
    """Print a plan as text. The arguments are those of `plan_summary`."""
    held_out = f", {plan.held_out:,} held out" if plan.held_out else ""
    say(f"examples: {plan.examples:,}{held_out}")
    say(f"tokens per example: {plan.tokens_per_example:.1f} on average, {plan.longest:,} at most")
    for phase in plan.phases:
        if not phase.steps:
            say(f"{phase.name}: peak memory about {size(phase.memory)} ({plan.device})")
            continue
        steps = f"{phase.steps:,} step{'' if phase.steps == 1 else 's'}"
        rate = "" if phase.lr is None else f" at a learning rate of {phase.lr:g}"
        say(
            f"{phase.name}: {steps}{rate}, about {phase.tokens / phase.steps:,.0f} tokens per step and "
            f"{phase.tokens:,} in total, peak memory about {size(phase.memory)} ({plan.device})"
        )
    say(f"weights: {plan.weights:,}, of which {plan.eligible:,} are eligible")
    if plan.entries is not None:
        say(f"entries: {plan.entries:,}")
    if plan.changes:
        say(f"changes of the mask during training: {plan.changes:,}")
    columns = ("layer", "eligible", "entries")[: 2 if plan.entries is None else 3]
    rows = [
        (
            "-" if layer.layer is None else str(layer.layer),
            f"{layer.eligible:,}",
            "?" if layer.entries is None else f"{layer.entries:,}",
        )
        for layer in plan.layers
    ]
    print_table(columns, [row[: len(columns)] for row in rows])
    if plan.entries is not None and any(layer.entries is None for layer in plan.layers):
        say("entries per layer: known once the mask is chosen")
    say(f"output files: {', '.join(files)}")
    say(f"working folders: {', '.join(folders)}")
    say("dry run: nothing was trained or written")


def training_lines(summary: dict[str, Any], *, in_a_row: bool) -> dict[str, Any]:
    """Return the report of a training run as text.

    Args:
        summary: The summary of the result.
        in_a_row: Whether the masks of earlier tasks were excluded. The report then says how many weights are left for
            later tasks.

    Returns:
        Label, with underscores, -> value, for `print_more`.
    """
    survived, free = summary["survived"], summary["free"]
    lines: dict[str, Any] = {}
    if summary["calibration_lr"] is not None:
        lines["calibration_learning_rate"] = f"{summary['calibration_lr']:g}"
    if summary["steps"]:
        rates = [f"{lr:g}" for lr in (*summary["via_lr"], summary["lr"])]
        lines["learning_rates" if len(rates) > 1 else "learning_rate"] = ", then ".join(rates)
        lines["examples"] = _rows_line(summary["rows"])
        if summary["eval_rows"]:
            lines["examples_held_out"] = _rows_line(summary["eval_rows"])
        lines |= {key: summary[key] for key in ("first_loss", "final_loss")}
        lines["tokens_per_second"] = f"{summary['tokens_per_second']:,.0f}"
    if summary["kept_step"] < summary["steps"]:
        lines["weights_kept"] = f"those after step {summary['kept_step']} of {summary['steps']}"
    if summary["eval_losses"]:
        lines["evaluated_loss"] = summary["eval_loss"]
        best = min(summary["eval_losses"], key=lambda entry: entry["loss"])
        lines["lowest_evaluated_loss"] = f"{best['loss']:.3f} after step {best['step']}"
    for name, points in summary["eval_metrics"].items():
        if points:
            most = max(points, key=lambda entry: entry["value"])
            lines[f"highest_{name}"] = f"{most['value']:.3f} after step {most['step']}"
    if summary["steps"] and free:
        lines["entries_that_change_their_weight"] = f"{survived:,} ({survived / summary['trained']:.1%})"
    if summary["replaced"] is not None:
        lines["entries_replaced_during_training"] = f"{summary['replaced']:,}"
    if in_a_row:
        fullest = min(free, key=free.__getitem__)
        share = f"{summary['free_share']:.2%} of the eligible weights"
        lines["free_for_later_tasks"] = f"{share}; least in {fullest} ({free[fullest]:.2%})"
    return lines


def _rows_line(rows: dict[str, Any]) -> str:
    """Describe the rows of tokens that the examples were turned into."""
    packed = "" if rows["packed"] is None else f" in {rows['packed']:,} packed rows"
    cut = f", {rows['truncated']:,} cut to {rows['limit']:,} tokens" if rows["truncated"] else ""
    return (
        f"{rows['rows']:,}{packed}, {rows['tokens']:,} tokens, {rows['trained']:,} of them with a loss; "
        f"the longest has {rows['longest']:,}{cut}"
    )


def preview_lines(preview: Preview) -> list[str]:
    """Return an example as lines of text (`train --show-example`).

    The first line gives the source of the example and its length. Each further line is one part of the example, which
    is either trained on or context. Its text is a JSON string, so that line breaks are visible.
    """
    return [
        f"{preview.where}: {preview.tokens:,} tokens, {preview.trained:,} of them trained on",
        *(
            f"{'trained:' if trains else 'context:'} {json.dumps(text, ensure_ascii=False)}"
            for text, trains in preview.parts
        ),
    ]


def evaluation_row(variant: Variant, paths: Sequence[str], results: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return what `eval --json` prints of one variant of the model.

    Args:
        variant: The variant.
        paths: The `.lota` files that were applied.
        results: Name of the data -> result.
    """
    merged = variant.merged
    return {
        "with": list(paths),
        "method": merged and merged["method"],
        "reason": merged and merged["reason"],
        "notes": list(variant.notes),
        "results": {
            name: {
                "examples": found.examples,
                "rows": found.rows and asdict(found.rows),
                "cut_prompts": found.cut_prompts,
                "metrics": {metric: asdict(value) for metric, value in found.metrics.items()},
            }
            for name, found in results.items()
        },
    }


def evaluation_summary(
    model: str, data: Mapping[str, Path], rows: Sequence[dict[str, Any]], answers: Path | None, *, is_table: bool
) -> dict[str, Any]:
    """Return what `eval --json` prints.

    Args:
        model: The model, as it was given.
        data: Name -> data.
        rows: What `evaluation_row` returned for each variant.
        answers: The file that the answers were written to, if any.
        is_table: Whether there may be several variants or data sets.
    """
    if is_table:
        return {"model": model, "data": {name: str(path) for name, path in data.items()}, "variants": list(rows)}
    ((name, path),) = data.items()
    (row,) = rows
    alone = {key: value for key, value in row.items() if key != "results"}
    return {
        "model": model,
        **alone,
        "data": str(path),
        **row["results"][name],
        "answers": None if answers is None else str(answers),
    }


def print_evaluation(summary: dict[str, Any]) -> None:
    """Print an evaluation as text: one line per metric, or a table of variants and data sets."""
    if "variants" in summary:
        _print_variants(summary)
        return
    from taskvec.evaluation.estimate import Estimate

    _print_merge(summary)
    count = summary["examples"]
    for name, found in summary["metrics"].items():
        say(f"{name}: {Estimate(**found)} ({count:,} example{'' if count == 1 else 's'})")
    if summary["answers"]:
        say(f"answers: {summary['answers']}")


def _print_merge(row: dict[str, Any]) -> None:
    """Print how the vectors of a variant were merged, if they were."""
    if row["method"]:
        say(f"merged by {row['method']}: {row['reason']}")
    for note in row["notes"]:
        say(f"note: {note}")


def _print_variants(summary: dict[str, Any]) -> None:
    from taskvec.evaluation.estimate import Estimate

    rows = summary["variants"]
    columns = [(data, metric) for data, found in rows[0]["results"].items() for metric in found["metrics"]]
    print_table(
        ("model", *(f"{data}\n{metric}" for data, metric in columns)),
        [
            (
                " + ".join(Path(path).name for path in row["with"]) or "base",
                *(str(Estimate(**row["results"][data]["metrics"][metric])) for data, metric in columns),
            )
            for row in rows
        ],
    )
    say(", ".join(f"{data}: {found['examples']:,} examples" for data, found in rows[0]["results"].items()))
    for row in rows:
        _print_merge(row)


def truncation_warnings(row: dict[str, Any]) -> Iterator[str]:
    """Yield a warning for each data set of which examples or prompts were truncated before they were scored.

    Args:
        row: What `evaluation_row` returned.
    """
    for name, found in row["results"].items():
        of = f" of {name}" if len(row["results"]) > 1 else ""
        rows, prompts = found["rows"], found["cut_prompts"]
        if rows and rows["truncated"]:
            yield (
                f"{rows['truncated']:,} of {rows['rows']:,} examples{of} were cut to {rows['limit']:,} tokens; "
                f"the longest has {rows['longest']:,}"
            )
        elif prompts:
            yield (
                f"{prompts:,} of {found['examples']:,} prompts{of} lost their beginning to leave room for the answer"
            )


def search_summary(result: SearchResult, metric: str, tasks: Sequence[str], written: Sequence[Path]) -> dict[str, Any]:
    """Return what `search --json` prints.

    Args:
        result: The result.
        metric: The metric.
        tasks: The names of the tasks.
        written: The files that were written.
    """
    return {
        "metric": metric,
        "tasks": list(tasks),
        "trials": [
            {
                "number": row.number,
                "merge": str(row.candidate),
                "values": row.values,
                "state": row.state,
                "seconds": row.seconds,
                "error": row.error,
            }
            for row in result.trials
        ],
        "best": [
            {
                "trial": each.trial,
                "merge": str(result.candidate(each.trial)),
                "held_out": {task: asdict(value) for task, value in each.metrics.items()},
                "plain_ties": {task: asdict(value) for task, value in each.plain.items()},
                "gain": None if each.gain is None else asdict(each.gain),
                "is_better": each.is_better,
                "is_plain_ties": each.is_plain,
            }
            for each in result.best
        ],
        "plain_ties_error": result.plain_error,
        "written": [str(path) for path in written],
    }


def print_search(summary: dict[str, Any]) -> None:
    """Print the result of a search: the best trials, and the comparison on the examples that were held out."""
    from taskvec.evaluation.estimate import Estimate

    trials, metric = summary["trials"], summary["metric"]
    states = Counter(trial["state"] for trial in trials)
    failed = f", {states['failed']} failed" if states["failed"] else ""
    say(f"{len(trials)} trials, {states['pruned']} of them pruned{failed}")
    for trial in [trial for trial in trials if trial["error"]][:3]:
        say(f"trial {trial['number']} failed: {trial['merge']}: {trial['error']}")
    if not summary["best"]:
        return
    done = [trial for trial in trials if trial["values"] is not None]
    order = sorted(done, key=lambda trial: sum(trial["values"]), reverse=metric != "loss")
    names = summary["tasks"] if len(done[0]["values"]) > 1 else ["mean"]
    print_table(
        ("merge", "trial", *(f"{metric}\n{name}" for name in names)),
        [(t["merge"], str(t["number"]), *(f"{value:.4f}" for value in t["values"])) for t in order[:10]],
        f"Best on the examples that were searched on ({min(len(done), 10)} of {len(done)} completed trials)",
    )
    plain = summary["best"][0]["plain_ties"]
    rows = [("plain TIES", "", *(str(Estimate(**value)) for value in plain.values()), "")] if plain else []
    for best in summary["best"]:
        values = (str(Estimate(**value)) for value in best["held_out"].values())
        gain = "" if best["gain"] is None or best["is_plain_ties"] else str(Estimate(**best["gain"]))
        rows.append((best["merge"], str(best["trial"]), *values, gain))
    print_table(
        ("merge", "trial", *(f"{metric}\n{task}" for task in summary["tasks"]), "gain"),
        rows,
        "On the examples that were held out",
    )
    first = summary["best"][0]
    verdict = "better" if first["is_better"] else "no better"
    if first["gain"] is None:
        say(f"plain TIES cannot be evaluated, so nothing is compared with it: {summary['plain_ties_error']}")
    elif first["is_plain_ties"]:
        say(f"trial {first['trial']}, the best one, is plain TIES itself")
    else:
        gain = f"the gain is {Estimate(**first['gain'])}"
        say(f"trial {first['trial']} is {verdict} than plain TIES: {gain}; better means above 2 standard errors")
    for path in summary["written"]:
        say(f"written: {path}")


def evaluation_warning(vector: TaskVector) -> str | None:
    """Return a warning if the vector also changes files that a model or tokenizer reads; otherwise None."""
    changed = [file.name for file in vector.header.files or () if file.blob and file.name != INDEX]
    read = [name for name in changed if name.endswith((".json", ".jinja", ".model", ".txt"))]
    if not read:
        return None
    return f"{vector.name} also changes {', '.join(read)}: eval applies only its weights; unpack applies all of it"


def overlap_summary(labels: Sequence[str], pair: Overlap) -> dict[str, Any]:
    """Return what `inspect --json` prints for one pair of vectors.

    Args:
        labels: The names of all vectors.
        pair: The overlap of two of them.
    """
    return {
        "a": labels[pair.a],
        "b": labels[pair.b],
        "intersection": pair.total.intersection,
        "union": pair.total.union,
        "jaccard": pair.total.jaccard,
        "expected_jaccard": pair.expected_jaccard,
        "sign_conflicts": pair.total.sign_conflicts,
        "cosine": pair.cosine,
    }


def demo_summary(demo: Demo) -> dict[str, Any]:
    """Return what `demo --json` prints."""
    return {
        "folder": str(demo.folder),
        "scores": {model: {task: asdict(score) for task, score in row.items()} for model, row in demo.scores.items()},
        "sizes": demo.sizes,
        "overlap": overlap_summary(list(demo.scores["base"]), demo.overlap),
        "picture": str(demo.picture),
        "merged": str(demo.folder / "merged"),
        "method": demo.method,
        "reason": demo.reason,
        "samples": [{"question": question, "answer": answer} for question, answer in demo.samples],
    }


def _form(form: dict[str, Any]) -> str:
    return f"{form['dtype']} {form['shape']}"


def exactness(applied: Applied) -> str:
    """Return the sentence that says whether the result equals the tuned checkpoint, and if not, why."""
    if applied.exact and applied.left_out:
        return "identical to the tuned checkpoint, byte for byte, except for what is not carried"
    if applied.exact:
        return "identical to the tuned checkpoint, byte for byte"
    return f"not identical to the tuned checkpoint: {'; '.join(applied.differences)}"


def not_carried(left_out: Sequence[str]) -> str:
    """Return the line that lists the content of the tuned folder that the vector does not carry."""
    return f"not carried: {', '.join(printable(each, _CELL) for each in left_out)}"


def print_file(summary: dict[str, Any]) -> None:
    """Print what `file_summary` returned: totals, origin, other contents, and a table with one row per module."""
    from taskvec.hub.base import recorded
    from taskvec.names import layer_and_module

    bits = summary["bits_per_entry"]
    say(f"{summary['path']}: {summary['kind']}, {_totals(summary)}" + (f", {bits:.1f} bits per entry" if bits else ""))
    for role in ("base", "tuned"):
        if summary[role]:
            say(f"{role}: {summary[role]['name']} ({summary[role]['fingerprint'][:12]})")
    if commit := recorded(summary["provenance"]):
        say(f"base on the Hub: {commit.repo}@{commit.revision}")
    reformed = [
        f"{tensor['name']} (added)" if tensor["origin"] is None else f"{tensor['name']} (was {_form(tensor['origin'])})"
        for tensor in summary["tensors"]
        if tensor["origin"] != {"shape": tensor["shape"], "dtype": tensor["dtype"]}
    ]
    for what, names in (
        ("other form", reformed),
        ("removed", summary["removed"]),
        ("side files", summary["side_files"]),
        ("not carried", summary["not_carried"]),
    ):
        if names:
            shown = ", ".join(printable(name, _CELL) for name in names[:8])
            say(f"{what}: {shown}{', …' if len(names) > 8 else ''}")
    facts = [
        printable(f"{key.replace('_', ' ')} {format(value, '.4g') if isinstance(value, float) else value}", _CELL)
        for key, value in summary["provenance"].items()
        if value is not None and not isinstance(value, (list, dict)) and key != "made_by"
    ]
    if "made_by" in summary["provenance"]:
        say(f"made by {summary['provenance']['made_by']}{': ' if facts else ''}{', '.join(facts)}")
    for line in parent_lines(summary["provenance"]):
        say(line)
    modules: dict[str, list[int]] = {}
    for tensor in summary["tensors"]:
        _, module = layer_and_module(tensor["name"])
        row = modules.setdefault(module, [0, 0, 0])
        row[0] += 1
        row[1] += tensor["entries"]
        row[2] += math.prod(tensor["shape"])
    print_table(
        ("module", "tensors", "entries", "density"),
        [
            (module, str(count), f"{entries:,}", f"{entries / total:.2%}" if total else "-")
            for module, (count, entries, total) in sorted(modules.items())
        ],
    )


def parent_lines(provenance: dict[str, Any]) -> list[str]:
    """The vectors that a vector was made of, as a tree with one line per vector, indented by generation.

    Args:
        provenance: Of the vector. Vectors that occur in it several times are described the first time.

    Returns:
        Name, weight, method and digest of each parent; an empty list if no parents are recorded.
    """
    ancestors = provenance.get("ancestors")
    ancestors = ancestors if isinstance(ancestors, dict) else {}
    lines: list[str] = []
    seen: set[str] = set()

    def add(made: dict[str, Any], depth: int) -> None:
        parents, weights = made.get("parents"), made.get("weights")
        parents = parents if isinstance(parents, list) else []
        # a merge lists its weights apart from its parents
        weights = weights if isinstance(weights, list) and len(weights) == len(parents) else [None] * len(parents)
        for parent, of_merge in zip(parents, weights, strict=True):
            if not isinstance(parent, dict) or depth > _GENERATIONS or len(lines) >= _ROWS:
                continue
            digest = str(parent.get("digest"))
            facts = ancestors.get(digest)
            facts = facts if isinstance(facts, dict) else {}
            weight = parent.get("weight", of_merge)
            details = [
                *([] if weight is None else [f"weight {weight}"]),
                *[str(facts[key]) for key in ("made_by", "method") if isinstance(facts.get(key), str)],
                digest,
            ]
            lines.append(printable(f"{'  ' * depth}- {parent.get('name')} ({', '.join(details)})", _CELL))
            if digest not in seen:
                seen.add(digest)
                add(facts, depth + 1)

    add(provenance, 1)
    return ["parents:", *lines] if lines else []


def print_lora(layers: Sequence[dict[str, Any]]) -> None:
    """Print a table of the layers of a LoRA adapter with one row per module.

    Args:
        layers: The name of the tensor, its rank and its error, per layer.
    """
    from taskvec.names import layer_and_module

    modules: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        modules.setdefault(layer_and_module(layer["tensor"])[1], []).append(layer)

    def span(each: list[dict[str, Any]], key: str, shown: Callable[[Any], str]) -> str:
        values = [layer[key] for layer in each]
        low, high = shown(min(values)), shown(max(values))
        return low if low == high else f"{low} – {high}"

    print_table(
        ("module", "layers", "rank", "relative error"),
        [
            (module, str(len(each)), span(each, "rank", str), span(each, "error", relative))
            for module, each in sorted(modules.items())
        ],
    )


def relative(error: float) -> str:
    """Return a relative error as text: in percent, or as a power of ten if it is near rounding."""
    return f"{error:.2%}" if error >= 5e-4 else f"{error:.0e}"


def print_overlap(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table of overlaps with one row per pair, from what `overlap_summary` returned."""
    print_table(
        ("pair", "inter-\nsection", "Jaccard", "by\nchance", "sign\nconflicts", "cosine"),
        [
            (
                f"{row['a']} × {row['b']}",
                f"{row['intersection']:,}",
                f"{row['jaccard']:.2%}",
                f"{row['expected_jaccard']:.2%}",
                f"{row['sign_conflicts']:,}",
                f"{row['cosine']:+.3f}",
            )
            for row in rows
        ],
        title="Overlap of the masks",
    )


def print_demo(demo: Demo) -> None:
    """Print the scores of the demo, the overlap of the masks, the paths of its outputs, and sample answers."""
    tasks = list(demo.scores["base"])
    dense = demo.sizes["dense checkpoint"]
    rows = []
    for model, scores in demo.scores.items():
        on_disk = dense if model == "base" else demo.sizes[f"{model}.lota"]
        ratio = "" if model == "base" else f"{dense / on_disk:.1f}×"
        figures = [text for task in tasks for text in (f"{scores[task].loss:.3f}", f"{scores[task].exact_match:.0%}")]
        name = {"base": "base", "merged": f"merged ({demo.method})"}.get(model, f"{model} ticket")
        rows.append((name, *figures, size(on_disk), ratio))
    columns = [column for task in tasks for column in (f"{task} loss", f"{task} exact")]
    print_table(("model", *columns, "on disk", "smaller"), rows, title="Held-out loss and exact match")
    print_overlap([overlap_summary(tasks, demo.overlap)])
    say(f"merged by {demo.method}: {demo.reason}")
    say(f"picture: {demo.picture}")
    say(f"merged model: {demo.folder / 'merged'}")
    for question, answer in demo.samples:
        typer.echo()
        say(f"> {question}")
        for line in answer.splitlines():
            say(f"  {line}")
