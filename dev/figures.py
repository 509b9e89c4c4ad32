"""Draws the paper's figures from dev/results.jsonl and from folders of runs (mask.json, log.jsonl, step-N/mask.pt).

    python dev/figures.py                        # into dev/*.png
    python dev/figures.py --runs out/sweep --only fig5,fig8

A figure without data is skipped, and a line says what it lacks.

Two lists of dicts go through this file. `masks` are lines as mask_line() in dev/sweep.py makes them, `tunings` are
lines of finetune.py. Both get the fields name (mlm, omp, kd-random, ...) and s, the fraction removed. A score is the
task's first metric at its best evaluation on dev, times 100, as in the paper.
"""

import argparse
import io
import json
import sys
import textwrap
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import pyplot as plt
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import glue_squad  # noqa: E402
import tamt  # noqa: E402
from dev.sweep import mask_line, read_lines  # noqa: E402


class NoData(Exception):
    """Says what a figure lacks."""


# ---------------------------------------------------------------------------------------------------
# 1. Read masks and fine-tunings
# ---------------------------------------------------------------------------------------------------


def read(args) -> tuple[list[dict], list[dict]]:
    """-> the masks and the fine-tunings of one model.

    Of lines of the same run the last counts. Folders of runs add masks, or folders to the masks. A figure knows masks
    by method, sparsity, seed and number of updates alone: a note says where that is not enough."""
    lines = {}
    for line in read_lines(args.results):
        is_left_out = any(words in line["command"] for words in args.without)
        if "task" in line and not is_left_out:  # those without a task are of bench.py
            same = ("command", "task", "seed", "sparsity", "mask", "settings")
            lines[str([line.get(name) for name in same])] = line
    lines = [*lines.values(), *read_folders(args.runs, args.without)]
    if not lines:
        sys.exit(f"nothing to draw: no lines in {args.results}, no runs in {', '.join(args.runs)}")

    counts = Counter(Path(line["model"]).name for line in lines)
    model = args.model or counts.most_common(1)[0][0]
    masks = {}
    tunings = []
    for line in lines:
        if Path(line["model"]).name != model:
            continue
        line = line | {"model": model}
        if line["task"] == "pretraining":
            mask = as_mask(line)
            key = (mask["name"], mask["s"], mask["mask_seed"], mask["step"])
            if key in masks and any(masks[key].get(name) != mask.get(name) for name in ("lr", "weights", "text")):
                print(f"note: {key} stands for several masks (of different lr, weights or text); the last one is "
                      "drawn; --without leaves others out")
            masks[key] = masks.get(key, {}) | mask
        elif line.get("best") and "," not in line["task"]:  # no shared encoders
            tunings.append(as_tuning(line))
    return list(masks.values()), tunings


def read_folders(roots, without) -> list[dict]:
    lines = []
    files = [file for root in roots for file in Path(root).rglob("mask.json")]
    for folder in sorted(file.parent for file in files):
        is_left_out = any(words in str(folder) for words in without)
        is_search = "sparsity" not in json.loads((folder / "mask.json").read_text())  # of finetune.py
        if not is_search and not is_left_out:
            lines.append(mask_line(folder) | {"folder": folder})
    return lines


def as_mask(line: dict) -> dict:
    fields = {"name": name_of(line), "s": line["sparsity"], "mask_seed": line["seed"], "step": line["steps"]}
    return line | fields


def as_tuning(line: dict) -> dict:
    mask = {"sparsity": 0.0}
    if line["mask"] is not None:
        mask = {"sparsity": line["sparsity"], "method": "of another program"} | line["mask"]
    settings = line["settings"]
    name = name_of(mask)
    weights = settings.get("weights", "pretrained")
    if weights != "pretrained":
        name += f"-{weights} weights"

    metric = next(iter(line["best"]))
    score = line["best"][metric]
    if line["task"] != "squad":  # its scores are in percent already
        score *= 100
    num_examples = line["steps"] * settings["batch_size"] // settings["epochs"]
    if settings["limit"]:
        num_examples = min(num_examples, settings["limit"])
    return line | {
        "name": name,
        "s": round(mask["sparsity"], 3),
        "mask": mask,
        "mask_seed": mask.get("seed"),
        "source": mask.get("task"),  # of a ticket that was found on a task
        "step": mask.get("step", 0),
        "limit": settings["limit"],
        "num_examples": num_examples,
        "metric": metric,
        "score": score,
    }


def name_of(mask: dict) -> str:
    """omp, kd, kd-random (random start), kd-local (local rank), dense: from settings or metadata."""
    if not mask["sparsity"]:
        return "dense"
    is_tamt = mask.get("method") == "tamt"
    words = [mask["objective"] if is_tamt else mask["method"]]
    usual = {"init": "omp", "rank": "global" if is_tamt else "local", "scope": "all"}
    for field, value in usual.items():
        if mask.get(field, value) != value:
            words.append(mask[field])
    return "-".join(words)


# ---------------------------------------------------------------------------------------------------
# 2. Choose and average
# ---------------------------------------------------------------------------------------------------


def group(items, field: str) -> dict:
    """{value of the field: items that have it}, sorted."""
    groups = defaultdict(list)
    for item in items:
        groups[item[field]].append(item)
    return dict(sorted(groups.items()))


def group_by(items, *fields: str) -> dict:
    """{(value of each field): items that have them}, sorted as text, since a seed may be None."""
    groups = defaultdict(list)
    for item in items:
        groups[tuple(item[field] for field in fields)].append(item)
    return dict(sorted(groups.items(), key=lambda pair: str(pair[0])))


def after_last_step(items) -> list[dict]:
    """Of each run only the masks or tunings after its last step. Tickets found on a task are left out."""
    items = [item for item in items if not item.get("source")]
    chosen = []
    for run in group_by(items, "name", "s", "mask_seed").values():
        last_step = max(item["step"] for item in run)
        chosen += [item for item in run if item["step"] == last_step]
    return chosen


def with_usual_limit(tunings) -> list[dict]:
    """With the --limit, or without one, that most runs of a task have. Tickets found on a task are left out."""
    tunings = [tuning for tuning in tunings if not tuning["source"]]
    usual = {}
    for task, runs in group(tunings, "task").items():
        usual[task] = Counter(tuning["limit"] for tuning in runs).most_common(1)[0][0]
    return [tuning for tuning in tunings if tuning["limit"] == usual[tuning["task"]]]


def common_tasks(tunings) -> list[str]:
    """The tasks that averages are taken over: those on which at least half of the masks were tried."""
    masks = group_by(with_usual_limit(tunings), "name", "s", "mask_seed", "step").values()
    counts = Counter()
    for runs in masks:
        counts.update({tuning["task"] for tuning in runs})
    return sorted(task for task, count in counts.items() if 2 * count >= len(masks))


def mean_scores(tunings, tasks) -> list[float]:
    """An average over the tasks for each pair of mask seed and fine-tuning seed that has all of them."""
    means = []
    for runs in group_by(tunings, "mask_seed", "seed").values():
        runs_of = group(runs, "task")
        if tasks and runs_of.keys() >= set(tasks):
            task_means = [np.mean([tuning["score"] for tuning in runs_of[task]]) for task in tasks]
            means.append(np.mean(task_means))
    return means


def names_in_order(items) -> list[str]:
    """The names of the items in the order of STYLES, others last; without the dense model."""
    styles = list(STYLES)
    names = {item["name"] for item in items if item["name"] != "dense"}

    def position(name):
        method = name.split("-")[0]
        return (styles.index(method) if method in styles else len(styles), name)

    return sorted(names, key=position)


def score_label(tunings, tasks) -> str:
    if len(tasks) > 1:
        return f"mean score of {len(tasks)} tasks"
    metric = next((tuning["metric"] for tuning in tunings if tuning["task"] in tasks), None)
    if metric is None:
        raise NoData("a task on which at least half of the masks were fine-tuned")
    return "accuracy (%)" if metric == "accuracy" else f"{metric} x 100"


# ---------------------------------------------------------------------------------------------------
# 3. Draw
# ---------------------------------------------------------------------------------------------------


class Style(NamedTuple):
    """Colour, marker and line say the same thing three times: two of them survive a black and white print."""
    label: str
    color: str
    marker: str
    line: str | tuple


STYLES = {
    "omp": Style("OMP", "0.35", "s", "--"),
    "random": Style("random", "0.6", "x", ":"),
    "imp": Style("IMP", "C1", "^", "-."),
    "mlm": Style("TAMT-MLM", "C0", "o", "-"),
    "kd": Style("TAMT-KD", "C2", "D", "-"),
    "mlm+kd": Style("TAMT-MLM+KD", "C4", "v", (0, (5, 1, 1, 1))),
    "winning": Style("winning", "C0", "o", "-"),
    "losing": Style("losing", "C1", "v", "--"),
}
DENSE_STYLE = {"color": "black", "linewidth": 0.9, "linestyle": (0, (1, 1))}
LOSSES = {"dev_mlm_loss": "dev MLM loss (nats)", "dev_kd_loss": "dev KD loss (1 - cos)"}
PRE_TRAINING = {  # titles: what is measured before any fine-tuning
    "dev_mlm_loss": "before: masked-LM loss",
    "dev_kd_loss": "before: KD loss",
}
MATRICES = {
    "attention.self.query": "Q",
    "attention.self.key": "K",
    "attention.self.value": "V",
    "attention.output.dense": "O",
    "intermediate.dense": "FFN in",
    "output.dense": "FFN out",
}


def style(name: str) -> dict:
    """Arguments for matplotlib. A variant (kd-random) has its method's colour, open markers and a dotted line."""
    method, _, variant = name.partition("-")
    chosen = STYLES.get(method, Style(method, "C5", "P", "-"))
    label = chosen.label
    if variant == "random":
        label += ", random start"
    elif variant:
        label += f", {variant}"
    return {
        "label": label,
        "color": chosen.color,
        "marker": chosen.marker,
        "linestyle": ":" if variant else chosen.line,
        "markersize": 5,
        "markerfacecolor": "white" if variant else chosen.color,
    }


def draw_line(ax, name: str, points: dict, shift: float = 0.0):
    """{x: [values]}: the line of the means, with standard deviations where there are several values. A small shift to
    the side keeps the bars of different methods apart."""
    points = {x: values for x, values in sorted(points.items()) if values}
    if not points:
        return
    means = [np.mean(values) for values in points.values()]
    deviations = [np.std(values, ddof=1) if len(values) > 1 else 0 for values in points.values()]
    look = style(name)
    if len(points) == 1:
        look["linestyle"] = ""  # a lone point has no line, in the legend either
    ax.errorbar([x + shift for x in points], means, deviations, capsize=2, linewidth=1.1, **look)


def draw_level(ax, values, label="whole network", **style):
    """A line at the mean, with a band of one standard deviation to both sides where there are several values."""
    if len(values):
        ax.axhline(np.mean(values), label=label, **DENSE_STYLE | style)
    if len(values) > 1:
        deviation = np.std(values, ddof=1)
        ax.axhspan(np.mean(values) - deviation, np.mean(values) + deviation, color="0.5", alpha=0.12, linewidth=0)


def floors(tunings, task: str) -> list[float]:
    """What always answering the most frequent class scores; [] for tasks of which no run says it."""
    return [100 * tuning["floor"][tuning["metric"]] for tuning in tunings
            if tuning["task"] == task and tuning.get("floor", {}).get(tuning["metric"])]


def draw_table(ax, values, rows, columns, number_format: str, limits=None):
    """A table of numbers on greys, dark for high; what is missing stays white. limits: the values that are lightest and
    darkest, by default the lowest and the highest of this table."""
    low, high = limits or (np.nanmin(values), np.nanmax(values))
    ax.imshow(values, cmap="Greys", vmin=low, vmax=high + (high - low) * 0.8 + 1e-9, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            ax.text(j, i, number_format.format(value), ha="center", va="center", fontsize=6.5)
    slant = {}
    if max(len(column) for column in columns) > 5:
        slant = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(range(len(columns)), columns, **slant)
    ax.set_yticks(range(len(rows)), rows)
    ax.grid(False)


def make_panels(num_panels: int, num_columns: int, width=3.0, height=2.4):
    """-> figure, list of axes; width and height of a panel in inches."""
    plt.rcParams.update({
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.fontsize": 7,
        "legend.frameon": False,
    })
    num_rows = -(-num_panels // num_columns)
    num_columns = min(num_columns, num_panels)
    size = (max(width * num_columns, 5.2), height * num_rows)
    figure, axes = plt.subplots(num_rows, num_columns, figsize=size, squeeze=False)
    for ax in axes.flat[num_panels:]:
        ax.axis("off")
    return figure, list(axes.flat[:num_panels])


def save(figure, path: Path, caption: str, used: list[dict]):
    """Writes the figure: the panels, one legend for all of them, and the caption.

    used: the masks and tunings that were drawn; the caption, if there is one, says how many they are."""
    width, height = figure.get_size_inches()
    paragraphs = [caption, facts(figure, used)] if caption else []
    wrapped = [textwrap.fill(paragraph, int(width * 19.5), break_on_hyphens=False) for paragraph in paragraphs]
    text = "\n".join(wrapped)

    legend = {}
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        legend.update(zip(labels, handles, strict=True))
    longest = max((len(label) for label in legend), default=0)
    num_columns = max(1, min(len(legend), int(width / (0.5 + 0.06 * longest))))

    # In inches from the lower edge: the caption, the legend, then the panels.
    caption_height = 0.132 * len(text.splitlines()) + 0.12
    below_panels = caption_height + 0.17 * -(-len(legend) // num_columns)
    total_height = height + below_panels
    figure.set_size_inches(width, total_height)
    figure.tight_layout(rect=(0, below_panels / total_height, 1, 1))
    figure.text(0.012, 0.05 / total_height, text, fontsize=6.5, va="bottom")
    if legend:
        figure.legend(legend.values(), legend.keys(), loc="lower center", ncol=num_columns, borderpad=0,
                      bbox_to_anchor=(0.5, caption_height / total_height))

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the size
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def facts(figure, used: list[dict]) -> str:
    """Model, text, tasks, how many runs, and what the bars are."""
    sentences = [f"Model {used[0].get('model')}"]
    for text in sorted({f"{Path(item['data']).name} at {item['seq_len']} tokens" for item in used if item.get("data")}):
        sentences.append(f"text {text}")
    tasks = sorted({item["task"] for item in used} - {"pretraining"})
    if tasks:
        sentences.append(f"tasks {', '.join(tasks)}")

    num_tunings = sum(item["task"] != "pretraining" for item in used)
    num_masks = len(used) - num_tunings
    counts = []
    if num_masks:
        counts.append(f"{num_masks} masks")
    if num_tunings:
        counts.append(f"{num_tunings} fine-tunings")
    sentences.append(f"n = {' and '.join(counts)}")

    seeds = {(item.get("mask_seed"), item.get("seed")) for item in used}
    if len(seeds) > 1 and any(ax.containers for ax in figure.axes):
        sentences.append("bars: standard deviation over seeds")
    return f"{'; '.join(sentences)}."


# ---------------------------------------------------------------------------------------------------
# 4. Figures of the paper
# ---------------------------------------------------------------------------------------------------


def fig1(masks, tunings, args):
    panels = ["dev_mlm_loss"]
    if tunings:
        panels.insert(0, common_tasks(after_last_step(tunings)))
    caption = "Like Fig. 1 of the paper: magnitude pruning (OMP) and random masks, no mask training."
    draw_against_sparsity(masks, tunings, ["omp", "random"], panels, args.out / "fig1.png", caption)


def fig3(masks, tunings, args):
    tasks = common_tasks(after_last_step(tunings))
    panels = [[task] for task in tasks]
    if len(tasks) > 1:
        panels.append(tasks)
    panels += LOSSES
    names = [name for name in names_in_order(masks + with_usual_limit(tunings)) if "-" not in name]
    caption = "Our runs, drawn like Fig. 3 and 4 of the paper; methods stand side by side, so that bars can be seen."
    draw_against_sparsity(masks, tunings, names, panels, args.out / "fig3.png", caption)


def headline(masks, tunings, args):
    """The README's picture: scores alone, of one task, without a caption, for the masks that its text compares."""
    shown = [tuning for tuning in tunings if tuning["name"] in ("omp", "imp", "mlm", "kd", "dense")]
    tasks = common_tasks(after_last_step(shown))
    if len(tasks) != 1:
        raise NoData("fine-tunings on one task")
    draw_against_sparsity([], shown, names_in_order(shown), [tasks], args.out / "headline.png", caption="")


def draw_against_sparsity(masks, tunings, names, panels, file, caption):
    """A panel for each of `panels`: a key of LOSSES, or a list of tasks for their mean score."""
    shown = [*names, "dense"]
    masks = [mask for mask in after_last_step(masks) if mask["name"] in shown]
    tunings = [tuning for tuning in after_last_step(with_usual_limit(tunings)) if tuning["name"] in shown]
    sparsities = defaultdict(set)
    for item in masks + tunings:
        sparsities[item["name"]].add(item["s"])
    if not any(len(sparsities[name]) > 1 for name in names):
        raise NoData("masks of one method at two sparsities")

    num_columns = {2: 2, 4: 2, 7: 4, 8: 4}.get(len(panels), 3)
    figure, axes = make_panels(len(panels), num_columns, 2.6)
    for ax, panel in zip(axes, panels, strict=True):
        if isinstance(panel, str):
            values = loss_values(masks, panel)
            ax.set(ylabel=LOSSES[panel], title=PRE_TRAINING[panel])
        else:
            runs_of = group_by(tunings, "name", "s")
            values = {key: mean_scores(runs, panel) for key, runs in runs_of.items()}
            ax.set(ylabel=score_label(tunings, panel))
            if len(panels) > 1 and len(panel) == 1:
                ax.set(title=f"fine-tuned on {panel[0]}")
        ax.set(xlabel="sparsity (%)", xticks=sorted({100 * s for name in names for s in sparsities[name]}))
        for index, name in enumerate(names):
            points = {100 * key[1]: of_key for key, of_key in values.items() if key[0] == name}
            draw_line(ax, name, points, shift=0.4 * (index - len(names) // 2))
        draw_level(ax, values.get(("dense", 0.0), []))
        if not isinstance(panel, str) and len(panel) == 1:
            draw_level(ax, floors(tunings, panel[0]), "most frequent class", color="0.6", linestyle="-")
    save(figure, file, caption, masks + tunings)


def loss_values(masks, loss: str) -> dict:
    """{(name, s): losses of its masks}"""
    values = {}
    for key, group_of_masks in group_by(masks, "name", "s").items():
        values[key] = [mask[loss] for mask in group_of_masks if loss in mask]
    return values


def fig5(masks, tunings, args):
    """A point for each mask, checkpoints included; Spearman's rho over all and within each sparsity."""
    losses_of = {}
    for mask in masks:
        for line in [*mask["curve"], mask]:
            losses_of[mask["name"], mask["s"], mask["mask_seed"], line["step"]] = line

    tasks = common_tasks(after_last_step(tunings))
    tunings = [tuning for tuning in with_usual_limit(tunings) if tuning["s"]]
    points = []
    for key, runs in group_by(tunings, "name", "s", "mask_seed", "step").items():
        scores = mean_scores(runs, tasks)
        if scores:
            losses = losses_of.get(key, runs[0]["mask"])
            points.append({**losses, "name": key[0], "s": key[1], "step": key[3], "score": np.mean(scores)})
    if sum("dev_kd_loss" in point for point in points) < 4:
        raise NoData("four masks with scores and dev losses")

    steps_of_mlm = sorted(point["step"] for point in points if point["name"] == "mlm")
    figure, axes = make_panels(2, 2)
    for ax, loss in zip(axes, LOSSES, strict=True):
        shown = [point for point in points if loss in point]
        for name in names_in_order(shown):
            for point in shown:
                if point["name"] == name:
                    look = style(name) | {"linestyle": "", "markersize": 11 - 9 * point["s"]}
                    ax.plot(point[loss], point["score"], **look)
                    if point["name"] == "mlm" and point["step"] > steps_of_mlm[0]:
                        ax.annotate(f"{point['step']:,}", (point[loss], point["score"]), (0, 5), ha="center",
                                    textcoords="offset points", fontsize=6, color=look["color"])
        title = textwrap.fill(f"rho at {correlations(shown, loss)}", 42)
        ax.set(title=title, xlabel=LOSSES[loss], ylabel=score_label(tunings, tasks))
    caption = (f"Like Fig. 5 of the paper: score against pre-training loss of {len(points)} masks and checkpoints; "
               "small markers: high sparsity; numbers: updates of the longer runs of TAMT-MLM; rho: Spearman's, at "
               "each sparsity and over all.")
    save(figure, args.out / "fig5.png", caption, tunings)


def correlations(points, loss: str) -> str:
    """Spearman's rho of loss and score over the points of each sparsity that has four, and over all points."""
    sets = {}
    for sparsity, of_sparsity in group(points, "s").items():
        if len(of_sparsity) >= 4:
            sets[f"{sparsity:.0%}"] = of_sparsity
    sets["all"] = points
    texts = []
    for name, chosen in sets.items():
        losses = np.array([point[loss] for point in chosen])
        scores = np.array([point["score"] for point in chosen])
        texts.append(f"{name}: {glue_squad.spearman(losses, scores):+.2f}")
    return ", ".join(texts)


def fig6(masks, tunings, args):
    names = [name for name in names_in_order(masks) if name in STYLES and name != "random"]
    caption = f"Like Fig. 6 of the paper: what a mask costs, {args.sparsity:.0%} removed."
    draw_along_training(masks, tunings, names, args, "fig6.png", caption, ["updates", "seconds of training"])


def fig7(masks, tunings, args):
    names = []
    for name in names_in_order(masks):
        if name.endswith("-random"):
            names += [name.removesuffix("-random"), name]
    if not names:
        raise NoData("runs with --init random")
    caption = f"Like Fig. 7 of the paper: from the OMP mask (filled) or a random one (open), {args.sparsity:.0%}."
    draw_along_training(masks, tunings, names, args, "fig7.png", caption, ["updates"])


def draw_along_training(masks, tunings, names, args, file, caption, units):
    """Mean score and dev losses (rows) against updates and seconds (columns)."""
    masks = [mask for mask in masks if mask["name"] in names and mask["s"] == args.sparsity]
    tunings = [tuning for tuning in with_usual_limit(tunings)
               if tuning["name"] in names and tuning["s"] == args.sparsity]
    tasks = common_tasks(tunings)  # checkpoints included
    tunings = [tuning for tuning in tunings if tuning["task"] in tasks]
    rows = {what: curves for what, curves in find_curves(masks, tunings, tasks, names).items() if is_curve(curves)}
    if not rows:
        raise NoData(f"scores or dev losses along a run at sparsity {args.sparsity:g}")

    seconds_per_update = {}
    for name in names:
        times = [mask["ms_per_step"] / 1e3 for mask in masks if mask["name"] == name]
        seconds_per_update[name] = np.mean(times or [0])
    figure, axes = make_panels(len(units) * len(rows), len(units), height=2.1)
    axes = iter(axes)
    for what, curves in rows.items():
        label = LOSSES.get(what, "mean score")
        for unit in units:
            ax = next(axes)
            ax.set(xlabel=unit, ylabel=label)
            for name, points in curves.items():
                scale = 1 if unit == "updates" else seconds_per_update[name]
                if name == "omp":
                    draw_level(ax, [value for values in points.values() for value in values], "OMP")
                else:
                    draw_line(ax, name, {x * scale: values for x, values in points.items()})
        caption += compare_with_imp(curves, seconds_per_update, label, is_loss=what in LOSSES)
    save(figure, args.out / file, caption, masks + tunings)


def find_curves(masks, tunings, tasks, names) -> dict:
    """{"score" or a loss: {name: {update: values}}}"""
    curves = {what: {name: defaultdict(list) for name in names} for what in ("score", *LOSSES)}
    for (name, step), runs in group_by(tunings, "name", "step").items():
        curves["score"][name][step] += mean_scores(runs, tasks)
    for mask in masks:
        for line in [*mask["curve"], mask]:
            for loss in LOSSES:
                if loss in line:
                    curves[loss][mask["name"]][line["step"]].append(line[loss])
    return curves


def is_curve(curves: dict) -> bool:
    """Whether there is something to see: two methods, and one of them at two updates."""
    num_points = [len(points) for points in curves.values()]
    return max(num_points) > 1 and sum(number > 0 for number in num_points) > 1


def compare_with_imp(curves, seconds_per_update, what: str, is_loss: bool) -> str:
    """A sentence: how many times sooner TAMT comes to IMP's best mean value."""
    sign = 1 if is_loss else -1  # afterwards low is good
    means = {}
    for name, points in curves.items():
        means[name] = {step: sign * np.mean(values) for step, values in points.items() if values}
    if not means.get("imp"):
        return ""
    best_step = min(means["imp"], key=means["imp"].get)
    if best_step == 0:
        return ""

    factors = []
    for name in ("mlm", "kd", "mlm+kd"):
        steps = [step for step, value in means.get(name, {}).items() if step and value <= means["imp"][best_step]]
        if steps:
            in_updates = best_step / min(steps)
            in_seconds = in_updates * seconds_per_update["imp"] / seconds_per_update[name]
            factors.append(f"{STYLES[name].label} {in_updates:.1f}, {in_seconds:.1f}")
        else:
            factors.append(f"{STYLES[name].label} never")
    return f" IMP's best {what} sooner by factors of (updates, seconds): {'; '.join(factors)}."


def fig8(masks, tunings, args):
    """Jaccard similarities of the final masks, and distance from OMP along the training."""
    shown = [mask for mask in masks if mask["s"] == args.sparsity and mask["scope"] == "all" and "folder" in mask]
    order = names_in_order(shown)
    if "omp" not in order or len(shown) < 3:
        raise NoData(f"folders (--runs) of OMP and two other masks at sparsity {args.sparsity:g}")
    shown.sort(key=lambda mask: (order.index(mask["name"]), mask["mask_seed"]))
    loaded = [tamt.load_mask(mask["folder"] / "mask.pt") for mask in shown]
    counts = Counter(mask["name"] for mask in shown)
    labels = []
    for mask in shown:
        label = style(mask["name"])["label"].removeprefix("TAMT-")
        labels.append(f"{label} {mask['mask_seed']}" if counts[mask["name"]] > 1 else label)

    figure, (left, right) = make_panels(2, 2, 3.3, 2.7)
    similarities = [[tamt.similarity(a, b) for b in loaded] for a in loaded]
    draw_table(left, np.array(similarities), labels, labels, "{:.2f}")
    left.set(title="similarity")

    omp = next(entries for mask, entries in zip(shown, loaded, strict=True) if mask["name"] == "omp")
    for name, runs in group([mask for mask in shown if mask["steps"]], "name").items():
        points = defaultdict(list)
        if name in ("mlm", "kd", "mlm+kd"):
            points[0].append(0.0)  # the training starts from the OMP mask
        for mask in runs:
            for step, file in files_of_steps(mask).items():
                points[step].append(1 - tamt.similarity(omp, tamt.load_mask(file)))
        draw_line(right, name, points)
    density = 1 - args.sparsity
    chance = density / (2 - density)
    draw_level(right, [1 - chance], "independent masks")
    right.set(title="distance from OMP", xlabel="updates", ylabel="1 - similarity")
    caption = (f"Like Fig. 8 of the paper: masks at {args.sparsity:.0%}: Jaccard similarity of kept weights, mean over "
               f"matrices; independent masks have {chance:.3f}.")
    save(figure, args.out / "fig8.png", caption, shown)


def files_of_steps(mask: dict) -> dict[int, Path]:
    """{update: mask file}. Of an IMP run only the last mask has the sparsity of the others."""
    files = {}
    if mask["name"] != "imp":
        for file in mask["folder"].glob("step-*/mask.pt"):
            files[int(file.parent.name.removeprefix("step-"))] = file
    files[mask["steps"]] = mask["folder"] / "mask.pt"
    return files


def fig9(masks, tunings, args):
    """Score against the number of fine-tuning examples, for what was tried with several numbers."""
    shown = after_last_step([tuning for tuning in tunings if tuning["s"] in (0, args.sparsity)])
    shown = with_several_limits(shown, "task")
    if not shown:
        raise NoData(f"fine-tunings with --limit at sparsity {args.sparsity:g}")
    shown = with_several_limits(shown, "name")
    tasks = list(group(shown, "task"))
    figure, axes = make_panels(len(tasks), 2 if len(tasks) in (2, 4) else 3)
    for ax, task in zip(axes, tasks, strict=True):
        for name in ["dense", *names_in_order(shown)]:
            runs = [tuning for tuning in shown if tuning["task"] == task and tuning["name"] == name]
            points = {}
            for number, of_number in group(runs, "num_examples").items():
                points[number] = [tuning["score"] for tuning in of_number]
            if name == "dense":
                ax.plot(list(points), [np.mean(scores) for scores in points.values()], label="whole network",
                        **DENSE_STYLE)
            else:
                draw_line(ax, name, points)
        ax.set(title=task, xlabel="fine-tuning examples", ylabel=score_label(shown, [task]), xscale="log")
        low, high = ax.get_xlim()
        ticks = [digit * 10**exponent for exponent in range(1, 7) for digit in (1, 3)]
        ticks = [tick for tick in ticks if low <= tick <= high]
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        ax.minorticks_off()
    caption = f"Like Fig. 9 of the paper: fewer examples to fine-tune on; masks at {args.sparsity:.0%}."
    save(figure, args.out / "fig9.png", caption, shown)


def with_several_limits(tunings, field: str) -> list[dict]:
    several = set()
    for value, runs in group(tunings, field).items():
        if len({tuning["limit"] for tuning in runs}) > 1:
            several.add(value)
    return [tuning for tuning in tunings if tuning[field] in several]


# ---------------------------------------------------------------------------------------------------
# 5. Other figures
# ---------------------------------------------------------------------------------------------------


def layers(masks, tunings, args):
    """Sparsity of each matrix under the global rank."""
    shown = [mask for mask in after_last_step(masks) if mask["rank"] == "global" and mask["s"] == args.sparsity]
    if not shown:
        raise NoData(f"masks ranked globally at sparsity {args.sparsity:g}")
    depth = sum("query" in matrix for matrix in shown[0]["found"]["matrices"])
    names = names_in_order(shown)
    removed_by = {}  # {name: {matrix: per cent removed, the mean over seeds}}
    for name in names:
        runs = [mask["found"]["matrices"] for mask in shown if mask["name"] == name]
        removed_by[name] = {matrix: 100 * np.mean([run[matrix] for run in runs]) for matrix in runs[0]}
    in_layers = [percent for removed in removed_by.values()
                 for matrix, percent in removed.items() if ".layer." in matrix]
    limits = (min(in_layers), max(in_layers))

    figure, axes = make_panels(len(names), 3, 2.6, 0.75 + 0.2 * depth)
    for ax, name in zip(axes, names, strict=True):
        removed = removed_by[name]
        values = np.empty((depth, len(MATRICES)))
        title = style(name)["label"]
        for matrix, percent in removed.items():
            if "word_embeddings" in matrix:
                title += f"; words {percent:.1f}"
            for i in range(depth):
                for j, kind in enumerate(MATRICES):
                    if f".layer.{i}.{kind}.weight" in matrix:
                        values[i, j] = percent
        draw_table(ax, values, range(1, depth + 1), list(MATRICES.values()), "{:.0f}", limits)
        ax.set(title=title, ylabel="layer")
    caption = ("Per cent removed of each matrix (words: word embeddings) where all weights are ranked in one list, "
               f"{args.sparsity:.0%} in all.")
    save(figure, args.out / "layers.png", caption, shown)


def transfer(masks, tunings, args):
    """Tickets found on a task and other masks of that sparsity, all on the same target tasks."""
    shown = after_last_step(with_usual_limit(tunings))
    shown += [tuning for tuning in tunings if tuning["source"] and tuning["name"] == "imp-global-encoder"]
    shown = [tuning | {"row": tuning["source"] or style(tuning["name"])["label"]} for tuning in shown]
    tickets = [tuning for tuning in shown if tuning["source"]]
    targets = sorted({tuning["task"] for tuning in tickets})
    dense = [tuning for tuning in shown if tuning["name"] == "dense"]
    if not {tuning["task"] for tuning in dense} & set(targets):
        raise NoData("tickets found on tasks (metadata: task) and scores of the whole network there")

    shown = [tuning for tuning in shown if tuning["s"] == tickets[0]["s"] and tuning["task"] in targets]
    rows = sorted({tuning["row"] for tuning in shown}, key=lambda row: (row not in targets, row))
    means = {}
    for key, runs in group_by(shown + dense, "row", "task").items():
        means[key] = np.mean([tuning["score"] for tuning in runs])
    gains = np.full((len(rows), len(targets)), np.nan)
    for i, row in enumerate(rows):
        for j, task in enumerate(targets):
            gains[i, j] = means.get((row, task), np.nan) - means.get(("dense", task), np.nan)

    figure, (ax,) = make_panels(1, 1, 0.8 * len(targets) + 1.6, 0.24 * len(rows) + 0.8)
    draw_table(ax, gains, rows, targets, "{:+.1f}")
    ax.set(xlabel="target task", ylabel="where the mask is from", title="score minus whole network")
    caption = f"Does one task's ticket serve another? {tickets[0]['s']:.0%} removed."
    save(figure, args.out / "transfer.png", caption, shown)


def super_tickets(masks, tunings, args):
    """Super Tickets (metadata: order winning, random or losing): score against the weights that remain."""
    shown = []
    for tuning in tunings:
        if tuning["mask"].get("order"):
            shown.append(tuning | {"remaining": 100 - 100 * tuning["mask"]["found"]["whole_model"]})
    if not shown:
        raise NoData("Super Tickets (metadata: method super, order, found.whole_model)")
    dense = [tuning for tuning in with_usual_limit(tunings) if tuning["name"] == "dense"]

    tasks = group(shown, "task")
    figure, axes = make_panels(len(tasks), 3, 2.6)
    for ax, (task, runs) in zip(axes, tasks.items(), strict=True):
        for order in ("winning", "random", "losing"):
            of_order = group([tuning for tuning in runs if tuning["mask"]["order"] == order], "remaining")
            points = {}
            for remaining, tickets in of_order.items():
                points[remaining] = [tuning["score"] for tuning in tickets]
            draw_line(ax, order, points)
        draw_level(ax, mean_scores(dense, [task]))
        ax.invert_xaxis()
        ax.set(title=task, xlabel="weights remaining (%)", ylabel=score_label(runs, [task]))
    caption = ("Super Tickets: whole heads and feed-forward layers removed, least important (winning), random, or most "
               "important (losing) first.")
    save(figure, args.out / "super.png", caption, shown)


FIGURES = {
    "fig1": fig1,
    "fig3": fig3,
    "headline": headline,
    "fig5": fig5,
    "fig6": fig6,
    "fig7": fig7,
    "fig8": fig8,
    "fig9": fig9,
    "layers": layers,
    "transfer": transfer,
    "super": super_tickets,
}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw the paper's figures from results and run folders.")
    parser.add_argument("--results", type=Path, default=Path("dev/results.jsonl"))
    parser.add_argument("--runs", nargs="*", default=["out"], help="folders that hold runs of tamt.py (out)")
    parser.add_argument("--without", nargs="*", default=[], help="leaves out lines whose command contains one of these")
    parser.add_argument("--model", help="its name, or the last part of its path (the one with most lines)")
    parser.add_argument("--sparsity", type=float, default=0.7, help="of figures 6 to 9 and layers (0.7)")
    parser.add_argument("--only", default=",".join(FIGURES), help=f"some of {','.join(FIGURES)}")
    parser.add_argument("--out", type=Path, default=Path("dev"))
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if not set(names) <= FIGURES.keys():
        parser.error(f"--only {args.only}: expected some of {','.join(FIGURES)}")

    plt.switch_backend("Agg")
    masks, tunings = read(args)
    for name in names:
        try:
            FIGURES[name](masks, tunings, args)
        except NoData as lacking:
            print(f"{name}: skipped, it needs {lacking}")


if __name__ == "__main__":
    main()
