"""Draws the paper's figures from dev/results.jsonl and run folders (mask.json, log.jsonl, step-N/mask.pt).

    python dev/figures.py --runs out/sweep       # into dev/*.png; --only fig5,fig8 for some of them

A figure without data is skipped and says what it lacks. `masks` are dicts as dev/sweep.py's mask_line makes
them, `tunes` lines of finetune.py; both get a `name` (mlm, omp, kd-random ...) and s, the sparsity (fraction
removed). Scores: the task's first metric at its best dev evaluation, x 100, as in the paper.
"""
import argparse
import io
import json
import re
import shlex
import sys
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from PIL import Image
from scipy.stats import spearmanr
from sweep import mask_line, read_lines

# Colour, marker and line say the same thing three times: two of them survive a black and white print.
STYLE = {"omp": ("OMP", "0.35", "s", "--"), "random": ("random", "0.6", "x", ":"),
         "imp": ("IMP", "C1", "^", "-."),
         "mlm": ("TAMT-MLM", "C0", "o", "-"), "kd": ("TAMT-KD", "C2", "D", "-"),
         "mlm+kd": ("TAMT-MLM+KD", "C4", "v", (0, (5, 1, 1, 1))),
         "winning": ("winning", "C0", "o", "-"), "losing": ("losing", "C1", "v", "--")}
LOSSES = {"dev_mlm_loss": "dev MLM loss (nats)", "dev_kd_loss": "dev KD loss (1 - cos)"}
LEVEL = {"color": "black", "linewidth": 0.9, "linestyle": (0, (1, 1))}  # a dotted level is the dense model
KINDS = {"attention.self.query": "Q", "attention.self.key": "K", "attention.self.value": "V",
         "attention.output.dense": "O", "intermediate.dense": "FFN in", "output.dense": "FFN out"}

# ---------------------------------------------------------------- what there is


def name_of(mask: dict) -> str:
    """From settings or metadata: omp, kd, kd-random (random start), kd-local (local rank), dense."""
    tamt = mask.get("method") == "tamt"
    usual = {"init": "omp", "rank": "global" if tamt else "local", "scope": "all"}
    other = [mask[key] for key in usual if mask.get(key, usual[key]) != usual[key]]
    return "-".join([mask["objective"] if tamt else mask["method"], *other]) if mask["sparsity"] else "dense"


def as_tune(line: dict) -> dict:
    mask, told = line["mask"] or {"sparsity": 0.0}, line["settings"]
    metric, value = next(iter(line["best"].items()))
    other = {"pretrained": ""}.get(weights := told.get("weights", "pretrained"), f"-{weights} weights")
    return line | {"name": name_of(mask) + other, "s": round(mask["sparsity"], 3), "mask": mask,
                   "mask_seed": mask.get("seed"), "source": mask.get("task"), "step": mask.get("step", 0),
                   "limit": told["limit"], "metric": metric,
                   "score": value if line["task"] == "squad" else 100 * value,
                   "n": min(told["limit"] or 1e9, line["steps"] * told["batch_size"] // told["epochs"])}


def read(args) -> tuple[list[dict], list[dict]]:
    """-> masks, tunes of one model. Of equal commands the last counts; folders of runs add to the masks."""
    lines = [line for line in read_lines(args.results) if "task" in line]  # the others are bench.py's
    lines = list({(line["command"], str(line.get("mask"))): line for line in lines}.values())
    folders = sorted(path.parent for root in args.runs for path in Path(root).rglob("mask.json")
                     if "sparsity" in json.loads(path.read_text()))  # a search of finetune.py has none
    lines += [mask_line(folder) | {"folder": folder} for folder in folders]
    models, masks = Counter(Path(line["model"]).name for line in lines), {}
    if not lines:
        sys.exit(f"nothing to draw: no lines in {args.results}, no runs in {', '.join(args.runs)}")
    chosen = args.model or models.most_common(1)[0][0]
    lines = [line | {"model": chosen} for line in lines if Path(line["model"]).name == chosen]
    for m in [line for line in lines if line["task"] == "pretraining"]:
        m |= {"name": name_of(m), "s": m["sparsity"], "mask_seed": m["seed"], "step": m["steps"]}
        key = m["name"], m["s"], m["seed"], m["step"]
        masks[key] = masks.get(key, {}) | m
    alone = [line for line in lines if line.get("best") and "," not in line["task"]]  # no shared encoders
    return list(masks.values()), [as_tune(line) for line in alone]


def group(items, *keys) -> dict:
    """{value of the key, or tuple of values: items that have it}, sorted."""
    found = defaultdict(list)
    for item in items:
        found[tuple(item[key] for key in keys) if keys[1:] else item[keys[0]]].append(item)
    return {key: found[key] for key in sorted(found, key=lambda k: str(k) if isinstance(k, tuple) else k)}


def last(items) -> list[dict]:
    """Of masks or tunes those after the last step of each run; tickets found on a task are another matter."""
    runs = group([x for x in items if not x.get("source")], "name", "s", "mask_seed").values()
    return [x for run in runs for x in run if x["step"] == max(y["step"] for y in run)]


def whole(tunes) -> list[dict]:
    """With all examples of a task, or with the --limit that most of its runs have: a CPU may need one."""
    usual = {task: Counter(t["limit"] for t in found).most_common(1)[0][0]
             for task, found in group(tunes, "task").items()}
    return [t for t in tunes if t["limit"] == usual[t["task"]] and not t["source"]]


def shared(tunes) -> list[str]:
    """The tasks that averages are taken over: those on which at least half of the masks were tried."""
    masks = group(whole(tunes), "name", "s", "mask_seed", "step").values()
    counts = Counter(task for runs in masks for task in {t["task"] for t in runs})
    return sorted(task for task, count in counts.items() if 2 * count >= len(masks))


def scores(tunes, tasks) -> list[float]:
    """An average over the tasks for each pair of mask seed and fine-tuning seed that has all of them."""
    pairs = [group(runs, "task") for runs in group(tunes, "mask_seed", "seed").values()]
    return [np.mean([np.mean([t["score"] for t in by[task]]) for task in tasks])
            for by in pairs if tasks and by.keys() >= set(tasks)]


def ordered(items) -> list[str]:
    known = list(STYLE)
    names = {x["name"]: x["name"].split("-")[0] for x in items if x["name"] != "dense"}
    return sorted(names, key=lambda name: (known.index(names[name]) if names[name] in known else 99, name))


# ---------------------------------------------------------------- pens


def style(name: str) -> dict:
    base, _, other = name.partition("-")
    label, color, marker, line = STYLE.get(base, (base, "C5", "P", "-"))
    label += {"": "", "random": ", random start"}.get(other, f", {other}")
    return {"label": label, "color": color, "marker": marker, "linestyle": ":" if other else line,
            "markersize": 5, "markerfacecolor": "white" if other else color}


def draw(ax, name: str, points: dict):
    """{x: [values]}: the line of the means, with standard deviations where there are two values or more."""
    points = {x: values for x, values in sorted(points.items()) if values}
    spread = [np.std(values, ddof=1) if values[1:] else 0 for values in points.values()]
    if points:
        means = [np.mean(values) for values in points.values()]
        ax.errorbar(list(points), means, spread, capsize=2, linewidth=1.1, **style(name))


def level(ax, values, name="full model"):
    if len(values):
        ax.axhline(np.mean(values), label=name, **LEVEL)


def canvas(panels: int, columns: int, width=3.0, height=2.4):
    """-> figure, list of axes."""
    plt.rcParams.update({"font.size": 8, "axes.titlesize": 8, "axes.grid": True, "grid.alpha": 0.3,
                         "legend.fontsize": 7, "legend.frameon": False})
    rows, columns = -(-panels // columns), min(columns, panels)
    size = max(width * columns, 5.2), height * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax in axes.flat[panels:]:
        ax.axis("off")
    return figure, list(axes.flat[:panels])


def heat(ax, values, rows, columns, digits: str):
    """A table of numbers on greys, dark for high; what is missing stays white."""
    low, high = np.nanmin(values), np.nanmax(values)
    ax.imshow(values, cmap="Greys", vmin=low, vmax=high + (high - low) * 0.8 + 1e-9, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            ax.text(j, i, digits.format(value), ha="center", va="center", fontsize=6.5)
    slant = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, columns)) > 5 else {}
    ax.set_xticks(range(len(columns)), columns, **slant)
    ax.set_yticks(range(len(rows)), rows)
    ax.grid(False)


def save(figure, path: Path, caption: str, used, facts=None):
    """Below the panels one legend for all, then the caption: what; model, text, tasks, n; one command."""
    texts = sorted({f"{Path(x['data']).name} at {x['seq_len']} tokens" for x in used if x.get("data")})
    tasks = sorted({x["task"] for x in used} - {"pretraining"})
    tuned = sum(x["task"] != "pretraining" for x in used)
    n = [f"{len(used) - tuned} masks" * (len(used) > tuned), f"{tuned} fine-tunings" * (tuned > 0)]
    seeds = {(x.get("mask_seed"), x.get("seed")) for x in used}
    bars = any(ax.containers for ax in figure.axes) and len(seeds) > 1
    facts = facts or [f"Model {used[0].get('model')}", *(f"text {text}" for text in texts),
             f"tasks {', '.join(tasks)}" * bool(tasks), f"n = {' and '.join(filter(None, n))}",
             "bars: standard deviation over seeds" * bars]
    run = next((x["command"] for x in reversed(used) if x.get("command")), "settings in each mask.json")
    run = " ".join(Path(word).name if word.startswith("/") else word for word in shlex.split(run))
    width, height = figure.get_size_inches()
    text = "\n".join(textwrap.fill(part, int(width * 19.5), break_on_hyphens=False) for part in (
        caption, f"{'; '.join(filter(None, facts))}.", f"One of the runs: {run}"))
    named = {k: v for ax in figure.axes for v, k in zip(*ax.get_legend_handles_labels(), strict=True)}
    columns = max(1, min(len(named), int(width / (0.6 + 0.06 * max(map(len, named), default=0)))))
    low = 0.132 * (text.count("\n") + 1) + 0.12  # inches
    high = low + 0.17 * -(-len(named) // columns)
    figure.set_size_inches(width, height + high)
    figure.tight_layout(rect=(0, high / (height + high), 1, 1))
    figure.text(0.012, 0.05 / (height + high), text, fontsize=6.5, va="bottom")
    if named:
        figure.legend(named.values(), named.keys(), loc="lower center", ncol=columns, borderpad=0,
                      bbox_to_anchor=(0.5, low / (height + high)))
    figure.savefig(buffer := io.BytesIO(), dpi=110)
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(128).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


# ---------------------------------------------------------------- figures; each returns what it lacks


def against_sparsity(masks, tunes, names, panels, file, caption):
    """A panel for each key of LOSSES and each list of tasks in `panels`."""
    masks, tunes = ([x for x in last(xs) if x["name"] in [*names, "dense"]] for xs in (masks, whole(tunes)))
    if not any(len({x["s"] for x in masks + tunes if x["name"] == name}) > 1 for name in names):
        return "masks of one method at two sparsities"
    figure, axes = canvas(len(panels), {2: 2, 4: 2, 7: 4, 8: 4}.get(len(panels), 3), 2.6)
    for ax, what in zip(axes, panels, strict=True):
        loss = what in list(LOSSES)
        by = group(masks if loss else tunes, "name", "s").items()
        found = {key: [m[what] for m in xs if what in m] if loss else scores(xs, what) for key, xs in by}
        for name in names:
            draw(ax, name, {100 * s: values for (n, s), values in found.items() if n == name})
        level(ax, found.get(("dense", 0.0), []))
        ax.set(xlabel="sparsity (%)", ylabel=LOSSES[what] if loss else score_of(tunes, what),
               title="before fine-tuning" if loss else "" if what[1:] else what[0])
    save(figure, file, caption, masks + tunes)


def score_of(tunes, tasks) -> str:
    return f"mean score of {len(tasks)} tasks" if tasks[1:] else next(
        f"{t['metric']} x 100" for t in tunes if t["task"] == tasks[0])


def fig1(masks, tunes, args):
    panels = [shared(last(tunes)), "dev_mlm_loss"] if tunes else ["dev_mlm_loss"]
    return against_sparsity(masks, tunes, ["omp", "random"], panels, args.out / "fig1.png",
                            "Fig. 1. Magnitude pruning (OMP) and random masks, no mask training.")


def fig3(masks, tunes, args):
    tasks, names = shared(last(tunes)), [name for name in ordered(masks + whole(tunes)) if "-" not in name]
    panels = [[task] for task in tasks] + [tasks] * (len(tasks) > 1) + list(LOSSES)
    return against_sparsity(masks, tunes, names, panels, args.out / "fig3.png",
                            "Fig. 3/4. Methods against sparsity.")


def fig5(masks, tunes, args):
    """A point for each mask, checkpoints included; Spearman's rho over all and within each sparsity."""
    known = {(m["name"], m["s"], m["seed"], at["step"]): at for m in masks for at in [*m["curve"], m]}
    tasks, points, tunes = shared(last(tunes)), [], [t for t in whole(tunes) if t["s"]]
    for key, runs in group(tunes, "name", "s", "mask_seed", "step").items():
        if values := scores(runs, tasks):
            losses = known.get(key, runs[0]["mask"])
            points.append({**losses, "name": key[0], "s": key[1], "score": np.mean(values)})
    if sum("dev_kd_loss" in p for p in points) < 4:
        return "four masks with scores and dev losses"
    figure, axes = canvas(2, 2)
    for ax, loss in zip(axes, LOSSES, strict=True):
        here = [p for p in points if loss in p]
        for p in sorted(here, key=lambda p: ordered(here).index(p["name"])):
            look = style(p["name"]) | {"linestyle": "", "markersize": 11 - 9 * p["s"]}
            ax.plot(p[loss], p["score"], **look)
        sets = {f"{s:.0%}": ps for s, ps in group(here, "s").items() if ps[3:]} | {"all": here}
        rho = [f"{k}: {spearmanr([(p[loss], p['score']) for p in ps])[0]:+.2f}" for k, ps in sets.items()]
        ax.set(title=textwrap.fill(f"rho at {', '.join(rho)}", 42), xlabel=LOSSES[loss],
               ylabel=score_of(tunes, tasks))
    save(figure, args.out / "fig5.png", f"Fig. 5. Score against pre-training loss, {len(points)} masks with "
         "checkpoints; small markers: high sparsity; rho: Spearman's, at each sparsity and over all.", tunes)


def along(masks, tunes, names, args, file, caption, columns):
    """Mean score and dev losses (rows) against updates and seconds (columns), and TAMT's speed."""
    found = defaultdict(lambda: {name: defaultdict(list) for name in names})
    masks, tunes = ([x for x in xs if x["name"] in names and x["s"] == args.sparsity]
                    for xs in (masks, whole(tunes)))
    tasks = shared(tunes)  # checkpoints included
    tunes = [t for t in tunes if t["task"] in tasks]
    for (name, step), runs in group(tunes, "name", "step").items():
        found["score"][name][step] += scores(runs, tasks)
    for m, loss in ((m, loss) for m in masks for loss in LOSSES):
        for at in [at for at in [*m["curve"], m] if loss in at]:
            found[loss][m["name"]][at["step"]].append(at[loss])
    found = {what: lines for what, lines in found.items()
             if max(map(len, lines.values())) > 1 and sum(map(bool, lines.values())) > 1}
    if not found:
        return f"scores or dev losses along a run at sparsity {args.sparsity:g}"
    pace = {name: [m["ms_per_step"] / 1e3 for m in masks if m["name"] == name] for name in names}
    pace = {name: np.mean(seconds or [0]) for name, seconds in pace.items()}
    figure, axes = canvas(columns * len(found), columns, height=2.1)
    for i, (what, lines) in enumerate(found.items()):
        for ax, unit in zip(axes[i * columns:], ["updates", "seconds of training"][:columns], strict=False):
            for name, points in lines.items():
                if name == "omp":
                    level(ax, [v for values in points.values() for v in values], "OMP")
                else:
                    draw(ax, name, {x * (pace[name] if unit[0] == "s" else 1): v for x, v in points.items()})
            ax.set(xlabel=unit, ylabel=LOSSES.get(what, "mean score"))
        caption += sooner(lines, pace, LOSSES.get(what, "mean score"), -1 if what == "score" else 1)
    save(figure, file, caption, masks + tunes)


def sooner(lines, pace, what, sign) -> str:
    """By which factors TAMT comes sooner to IMP's best mean value (sign 1: low is good)."""
    means = {name: {x: sign * np.mean(v) for x, v in points.items() if v} for name, points in lines.items()}
    goal, at = min(((value, x) for x, value in means.get("imp", {}).items()), default=(None, 0))
    said = []
    for name in ("mlm", "kd", "mlm+kd") if at else ():
        x = min((x for x, value in means.get(name, {}).items() if x and value <= goal), default=0)
        factors = f"{at / x:.1f}, {at * pace['imp'] / x / pace[name]:.1f}" if x else "never"
        said.append(f"{style(name)['label']} {factors}")
    return f" IMP's best {what} sooner by factors of (updates, seconds): {'; '.join(said)}." if said else ""


def fig6(masks, tunes, args):
    names = [name for name in ordered(masks) if name in STYLE and name != "random"]
    caption = f"Fig. 6. What a mask costs, {args.sparsity:.0%} removed."
    return along(masks, tunes, names, args, args.out / "fig6.png", caption, 2)


def fig7(masks, tunes, args):
    late = [name for name in ordered(masks) if name.endswith("-random")]
    names = [name for pair in ((name.removesuffix("-random"), name) for name in late) for name in pair]
    caption = f"Fig. 7. Training from the OMP mask (filled) or a random one (open), {args.sparsity:.0%}."
    lacks = "runs with --init random"
    return along(masks, tunes, names, args, args.out / "fig7.png", caption, 1) if names else lacks


def fig8(masks, tunes, args):
    """Jaccard similarities of the final masks, and distance from OMP over the steps."""
    here = [m for m in masks if m["s"] == args.sparsity and "folder" in m]
    order, first = ordered(here), next((m for m in here if m["name"] == "omp"), None)
    if not first or len(here) < 3:
        return f"folders (--runs) of OMP and two other masks at sparsity {args.sparsity:g}"
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    import tamt
    here = sorted(here, key=lambda m: (order.index(m["name"]), m["seed"]))
    kept, twice = [tamt.load_mask(m["folder"] / "mask.pt") for m in here], Counter(m["name"] for m in here)
    names = [style(m["name"])["label"].removeprefix("TAMT-") + f" {m['seed']}" * (twice[m["name"]] > 1)
             for m in here]
    figure, (left, right) = canvas(2, 2, 3.3, 2.7)
    heat(left, np.array([[tamt.similarity(a, b) for b in kept] for a in kept]), names, names, "{:.2f}")
    left.set(title="similarity")
    omp, chance = kept[here.index(first)], (1 - args.sparsity) / (1 + args.sparsity)  # d / (2 - d), d = 1 - s
    for name, runs in group([m for m in here if m["steps"]], "name").items():
        points = defaultdict(list, {} if name == "imp" or "random" in name else {0: [0.0]})
        for m in runs:
            # An IMP run's earlier masks have a lower sparsity: only its last one is comparable.
            files = {int(path.parent.name[5:]): path for path in m["folder"].glob("step-*/mask.pt")}
            files = ({} if name == "imp" else files) | {m["steps"]: m["folder"] / "mask.pt"}
            for step, path in files.items():
                points[step].append(1 - tamt.similarity(omp, tamt.load_mask(path)))
        draw(right, name, points)
    level(right, [1 - chance], "independent masks")
    right.set(title="distance from OMP", xlabel="updates", ylabel="1 - similarity")
    save(figure, args.out / "fig8.png", f"Fig. 8. Masks at {args.sparsity:.0%}: Jaccard similarity of kept "
         f"weights, mean over matrices; independent masks have {chance:.3f}.", here)


def fig9(masks, tunes, args):
    here = last([t for t in tunes if t["s"] in (0, args.sparsity)])
    tasks = [task for task, runs in group(here, "task").items() if len({t["limit"] for t in runs}) > 1]
    if not tasks:
        return f"fine-tunings with --limit at sparsity {args.sparsity:g}"
    here = [t for t in here if t["task"] in tasks]
    several = {name for name, runs in group(here, "name").items() if len({t["limit"] for t in runs}) > 1}
    here = [t for t in here if t["name"] in several]
    figure, axes = canvas(len(tasks), 2 if len(tasks) in (2, 4) else 3)
    for ax, task in zip(axes, tasks, strict=True):
        for name in ["dense", *ordered(here)]:
            runs = group([t for t in here if (t["task"], t["name"]) == (task, name)], "n")
            points = {n: [t["score"] for t in ts] for n, ts in runs.items()}
            if name == "dense":
                ax.plot(list(points), [np.mean(v) for v in points.values()], label="full model", **LEVEL)
            else:
                draw(ax, name, points)
        ax.set(title=task, xlabel="fine-tuning examples", ylabel=score_of(here, [task]), xscale="log")
        (low, high), ticks = ax.get_xlim(), [n * 10**e for e in range(1, 7) for n in (1, 3)]
        ax.set_xticks(shown := [n for n in ticks if low <= n <= high], [f"{n:,}" for n in shown])
        ax.minorticks_off()
    caption = f"Fig. 9. Fewer examples to fine-tune on; masks at {args.sparsity:.0%}."
    save(figure, args.out / "fig9.png", caption, here)


def layers(masks, tunes, args):
    """Sparsity of each matrix under the global rank."""
    here = [m for m in last(masks) if m["rank"] == "global" and m["s"] == args.sparsity]
    if not here:
        return f"masks ranked globally at sparsity {args.sparsity:g}"
    depth = sum("query" in matrix for matrix in here[0]["found"]["matrices"])
    figure, axes = canvas(len(ordered(here)), 3, 2.6, 0.75 + 0.2 * depth)
    for ax, name in zip(axes, ordered(here), strict=True):
        runs = [m["found"]["matrices"] for m in here if m["name"] == name]
        mean = {matrix: 100 * np.mean([run[matrix] for run in runs]) for matrix in runs[0]}
        values = [[mean[k] for kind in KINDS for k in mean if f".{i}.{kind}." in k] for i in range(depth)]
        words = [f"; words {v:.1f}" for k, v in mean.items() if "word_embeddings" in k]
        heat(ax, np.array(values), range(1, depth + 1), list(KINDS.values()), "{:.0f}")
        ax.set(title=style(name)["label"] + "".join(words), ylabel="layer")
    save(figure, args.out / "layers.png", "Per cent removed of each matrix (words: word embeddings) where "
         f"all weights are ranked in one list, {args.sparsity:.0%} in all.", here)


def transfer(masks, tunes, args):
    """Tickets found on a task (metadata `task`) and other masks of that sparsity, on the same targets."""
    plain = [t | {"row": t["source"] or style(t["name"])["label"]} for t in last(whole(tunes)) + [
        t for t in tunes if t["source"] and t["name"] == "imp-global-encoder"]]
    found = [t for t in plain if t["source"]]
    targets, full = sorted({t["task"] for t in found}), [t for t in plain if t["name"] == "dense"]
    if not found or not {t["task"] for t in full} & set(targets):
        return "tickets found on tasks (metadata: task) and scores of the full model there"
    here = [t for t in plain if t["s"] == found[0]["s"] and t["task"] in targets]
    rows = sorted({t["row"] for t in here}, key=lambda row: (row not in targets, row))
    mean = {key: np.mean([t["score"] for t in ts]) for key, ts in group(here + full, "row", "task").items()}
    gain = [[mean.get((row, task), np.nan) - mean.get(("dense", task), np.nan) for task in targets]
            for row in rows]
    figure, (ax,) = canvas(1, 1, 0.8 * len(targets) + 1.6, 0.24 * len(rows) + 0.8)
    heat(ax, np.array(gain), rows, targets, "{:+.1f}")
    ax.set(xlabel="target task", ylabel="where the mask is from", title="score minus full model")
    caption = f"Does one task's ticket serve another? {found[0]['s']:.0%} removed."
    save(figure, args.out / "transfer.png", caption, here)


def phase(masks, tunes, args):
    """Super Tickets (metadata: method super, order winning | random | losing): score against weights left."""
    here = [t for t in tunes if t["mask"].get("order")]
    here = [t | {"left": 100 - 100 * t["mask"]["found"]["whole_model"]} for t in here]
    if not here:
        return "Super Tickets (metadata: method super, order, found.whole_model)"
    tasks = group(here, "task")
    figure, axes = canvas(len(tasks), 3, 2.6)
    for ax, (task, runs) in zip(axes, tasks.items(), strict=True):
        for order in ("winning", "random", "losing"):
            mine = group([t for t in runs if t["mask"]["order"] == order], "left")
            draw(ax, order, {left: [t["score"] for t in ts] for left, ts in mine.items()})
        level(ax, scores([t for t in whole(tunes) if t["name"] == "dense"], [task]))
        ax.invert_xaxis()
        ax.set(title=task, xlabel="weights remaining (%)", ylabel=score_of(runs, [task]))
    save(figure, args.out / "super.png", "Super Tickets: whole heads and feed-forward layers removed, least "
         "important (winning), random, or most important (losing) first.", here)


def cost(masks, tunes, args):
    """Seconds and memory of a step, as `python dev/bench.py --only work --json FILE` measured them."""
    rows, pattern = [], re.compile(r"work, (.+), ([\d,]+) parameters, ([\d,]+) tokens: (\w+)")
    for line in read_lines(args.results):
        if found := pattern.fullmatch(line.get("figure", "")):
            name, weights, tokens, what = found.groups()
            weights, tokens = int(weights.replace(",", "")) / 1e6, int(tokens.replace(",", ""))
            rows.append(line | {"name": name, "weights": weights, "tokens": tokens, "what": what})
    if not rows:
        return "lines of dev/bench.py --only work --json"
    figure, axes = canvas(4, 2, 2.9)
    panels = [(what, by) for what in ("seconds", "MB") for by in ("tokens", "weights")]
    for ax, (what, by) in zip(axes, panels, strict=True):
        lines = group([r for r in rows if r["what"] == what], "name" if by == "tokens" else "tokens")
        for mark, (name, line) in zip("os^D", lines.items(), strict=False):
            x, y = np.array(sorted((r[by], r["median"]) for r in line)).T
            ax.plot(x, y, marker=mark, markersize=4, label=name if by == "tokens" else f"{name} tokens")
            if by == "weights":  # the last straight line, on to BERT-large's 302 million
                slope = np.diff(y)[-1] / np.diff(x)[-1]
                ax.plot([x[-1], 302], [y[-1], y[-1] + (302 - x[-1]) * slope], "k:")
        ax.set(xlabel="tokens a step" if by == "tokens" else "weights of the encoder (millions)",
               ylabel="seconds a step" if what == "seconds" else "peak memory (MB)", ylim=(0, None))
    save(figure, args.out / "cost.png", "What a TAMT-MLM step costs; dotted: on to BERT-large, on paper.",
         [rows[0] | {"task": "pretraining"}], [rows[0]["hardware"], rows[0]["date"]])


def main():
    drawn = (fig1, fig3, fig5, fig6, fig7, fig8, fig9, layers, transfer, phase, cost)
    figures = {f.__name__: f for f in drawn}
    parser = argparse.ArgumentParser(description="Draws the paper's figures from results and run folders.")
    parser.add_argument("--results", type=Path, default=Path("dev/results.jsonl"))
    parser.add_argument("--runs", nargs="*", default=["out"], help="folders that hold runs of tamt.py (out)")
    parser.add_argument("--model", help="its name, or the last part of its path (the one with most lines)")
    parser.add_argument("--sparsity", type=float, default=0.7, help="of figures 6 to 9 and layers (0.7)")
    parser.add_argument("--only", default=",".join(figures), help=f"some of {','.join(figures)}")
    parser.add_argument("--out", type=Path, default=Path("dev"))
    args = parser.parse_args()
    plt.switch_backend("Agg")
    masks, tunes = read(args)
    for name in args.only.split(","):
        if lacks := figures[name](masks, tunes, args):
            print(f"{name}: skipped, it needs {lacks}")


if __name__ == "__main__":
    main()
