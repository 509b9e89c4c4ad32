"""The promises, in the order of the modules: bert, data, tamt, glue_squad, finetune. Real files are used where they are at hand."""

import ast
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bert
import data
import finetune
import glue_squad
import tamt

ROOT = Path(__file__).parent
REAL = ROOT.parent / "shared" / "data"  # real weights, tables and text; not part of the repository
real = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real inputs")
WORDS = "the a cat dog bird house tree sees likes finds big small red old new and runs sits here there".split()


def run(main, *argv):
    """Calls a program as its command line does -> exit status."""
    with pytest.raises(SystemExit) as end:
        tamt.run(lambda: (main([str(a) for a in argv]), sys.exit(0)))
    return end.value.code


def tiny(folder, family="bert", seed=0, **sizes):
    """An ordinary model folder: two layers, 32 wide, a vocabulary of whole words."""
    torch.manual_seed(seed)
    specials = list(data.WORDPIECE_SPECIALS if family == "bert" else data.BPE_SPECIALS)
    kind = {"model_type": family, "max_position_embeddings": 64 + 2 * (family == "roberta")}
    if family == "roberta":
        kind |= {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
    letters = "".join(sorted({*"".join(WORDS)}))
    vocab = [*specials, ".", *WORDS, *letters, *(f"##{c}" for c in letters)]
    vocab = list(dict.fromkeys(vocab))
    if family == "roberta":
        vocab = ["<s>", "<pad>", "</s>", "<unk>", *dict.fromkeys(letters + ".Ġ"), "<mask>"]
    model = bert.Model(bert.Config(**({"vocab_size": len(vocab), "hidden_size": 32, "num_hidden_layers": 2,
                                       "num_attention_heads": 4, "intermediate_size": 64} | kind | sizes)))
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.05  # no zeros, no ones: every tensor matters
    bert.save(folder, model.config, dict(model.named_parameters()), "ForMaskedLM")
    if family == "bert":
        (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
    else:
        (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocab)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A tiny model and a text with some order in it."""
    folder = tmp_path_factory.mktemp("world")
    os.environ["TAMT_CACHE"] = str(folder / "cache")
    rng = random.Random(0)
    lines = [" ".join(["the", rng.choice(WORDS[6:9]), *rng.sample(WORDS, 5)]) + " ." for _ in range(900)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    tiny(folder / "bert")
    tiny(folder / "roberta", "roberta")
    return folder


@pytest.fixture(params=["bert", "roberta"])
def model(request, world):
    return bert.load(world / request.param)


# ---------------------------------------------------------------- tamt: one exact rank


def brute_force(values, prune):
    keep = torch.ones(len(values), dtype=torch.bool)
    keep[sorted(range(len(values)), key=lambda i: (float(values[i]), -i))[:prune]] = False
    return keep


def test_keep_mask_is_exact_with_ties_and_any_guess():
    rng = random.Random(0)
    assert tamt.keep_mask(torch.tensor([3.0, 1, 2, 2, 2]), 3)[0].tolist() == [True, False, True, False, False]
    for _ in range(600):
        n = rng.randint(1, 60)
        values = torch.randint(-3, 4, (n,)).float() if rng.random() < 0.6 else torch.randn(n)
        prune = rng.randint(0, n)
        expected = brute_force(values, prune)
        keep, phi = tamt.keep_mask(values, prune)
        assert torch.equal(keep, expected)
        guess = phi if np.isfinite(phi) else 0.0
        again, phi_near = tamt.keep_mask(values, prune, (guess - rng.random(), guess + rng.random()))
        assert torch.equal(again, expected)
        ordered = values.sort().values
        if 0 < prune < n and ordered[prune - 1] < ordered[prune]:  # no tie at the cut: phi says what the mask says
            assert torch.equal(values > phi, expected) and torch.equal(values > phi_near, expected)


def test_every_method_prunes_exactly_the_count(model):
    layers, rng = tamt.mask_model(model), random.Random(1)
    sizes = {name: layer.mask.numel() for name, layer in layers.items()}
    assert len(layers) == 6 * model.config.num_hidden_layers + 2
    for trial in range(120):
        s = rng.choice([0.0, 0.29, 0.5, 0.7, 0.9, 0.999, rng.random()])
        for masks, rule in [(f(rule), rule) for rule in ("local", "global") for f in (
                lambda r, s=s: tamt.magnitude_masks(layers, s, r),
                lambda r, s=s, t=trial: tamt.random_masks(layers, s, r, t))]:
            pruned = {name: int((~mask).sum()) for name, mask in masks.items()}
            assert rule == "global" or pruned == {name: round(n * s) for name, n in sizes.items()}
            assert rule == "local" or sum(pruned.values()) == round(sum(sizes.values()) * s)
    for name, mask in tamt.magnitude_masks(layers, 0.6, "local").items():
        w = layers[name].weight.detach().abs()
        assert w[mask].min() >= w[~mask].max()


# ---------------------------------------------------------------- tamt: scores, gradients, losses


def small_batch(model, rows=4, length=20):
    torch.manual_seed(1)
    return torch.randint(6, model.config.vocab_size - 1, (rows, length)), torch.arange(0, rows * length, 5)


def test_scores_get_the_gradient_of_the_masked_weight_times_w(model):
    """Against autograd on plain weights W * M, the decoder kept dense: worst matrix within 1e-5 relative."""
    plain = bert.load(Path(os.environ["TAMT_CACHE"]).parent / model.config.model_type)
    layers, (ids, at) = tamt.mask_model(model), small_batch(model)
    scores = tamt.Scores(layers, tamt.magnitude_masks(layers, 0.6, "local"), 0.6, "global")
    labels = ids.reshape(-1)[at]
    with tamt.dense_teacher(model):
        teacher = model(ids)
    student = model(ids)
    loss = tamt.mlm_loss(model.mlm_logits(student[-1].flatten(0, 1)[at]), labels) + tamt.kd_loss(teacher, student)
    loss.backward()
    words = plain.base.embeddings.word_embeddings
    decoder = words.weight.detach().clone()
    for name, layer in layers.items():
        plain.get_parameter(name).data.mul_(layer.mask)
    hidden = plain(ids)
    head = plain.lm_head if plain.config.model_type == "roberta" else plain.cls["predictions"]
    again = F.cross_entropy(head(hidden[-1].flatten(0, 1)[at], decoder), labels) + tamt.kd_loss(teacher, hidden)
    again.backward()
    assert abs(loss.item() - again.item()) < 1e-6
    for name, layer in layers.items():
        if "pooler" in name:
            assert layer.scores.grad is None
            continue
        expected = plain.get_parameter(name).grad * layer.weight
        assert (layer.scores.grad - expected).norm() <= 1e-5 * expected.norm(), name
        assert layer.scores.data_ptr() >= scores.vector.data_ptr()  # a view: ranking the vector ranks the layers


def test_teacher_is_the_dense_model_without_a_copy(model):
    ids, _ = small_batch(model)
    dense = model(ids)
    layers = tamt.mask_model(model)
    before = {name: layer.weight.data_ptr() for name, layer in layers.items()}
    tamt.set_masks(layers, tamt.magnitude_masks(layers, 0.5, "local"))
    model.train()
    with tamt.dense_teacher(model) as teacher:
        assert all(torch.equal(a, b) for a, b in zip(dense, teacher(ids), strict=True))
    assert model.training and before == {name: layer.weight.data_ptr() for name, layer in layers.items()}
    model.eval()
    assert tamt.kd_loss(dense, dense).abs() < 1e-6
    assert (tamt.kd_loss(dense, [-h for h in dense]) - 2).abs() < 1e-6
    assert tamt.kd_loss(dense, model(ids)) > 0.01
    a, b = torch.tensor([[[1.0, 0], [0, 1]]]), torch.tensor([[[0.0, 1], [0, 1]]])
    assert tamt.kd_loss([a, a], [b, b]).item() == 0.5  # one token orthogonal, one equal
    assert tamt.kd_loss([a, a], [b, b], torch.tensor([[False, True]])).item() == 0.0  # padding is left out
    tamt.set_masks(layers, tamt.magnitude_masks(layers, 0.0, "global"))
    assert all(torch.equal(a, b) for a, b in zip(dense, model(ids), strict=True))  # sparsity 0 is the dense model


def test_embedding_mask_leaves_the_tied_decoder_dense(model):
    ids, at = small_batch(model)
    hidden = model(ids)[-1]
    dense = model.mlm_logits(hidden)
    layers = tamt.mask_model(model)
    tamt.set_masks(layers, tamt.magnitude_masks(layers, 0.9, "local"))
    assert torch.equal(model.mlm_logits(hidden), dense) and not torch.equal(model(ids)[0], hidden)


def test_start_is_omp_and_exact(model):
    layers = tamt.mask_model(model)
    start = tamt.magnitude_masks(layers, 0.7, "local")
    scores = tamt.Scores(layers, start, 0.7, "global")
    assert {0.0, np.float32(0.02)} == {*np.unique(scores.vector.numpy())}
    assert int((~scores.mask).sum()) == round(len(scores.mask) * 0.7)
    assert sum(int((start[n] ^ layer.mask).sum()) for n, layer in layers.items()) <= len(layers)  # rounding alone
    local = tamt.Scores(layers, start, 0.7, "local")
    assert all(torch.equal(start[name], layer.mask) for name, layer in layers.items())
    local.gate()
    assert all(torch.equal(start[name], layer.mask) for name, layer in layers.items())


# ---------------------------------------------------------------- tamt: runs


def find(world, *more, family="bert", steps=12, out="run", method="tamt"):
    argv = ["--model", world / family, "--data", world / "text.txt", "--steps", steps, "--seq-len", 16, "--batch-size", 8,
            "--save-every", 5, "--eval-every", 100, "--log-every", 4, "--out", world / out, "--method", method, *more]
    return run(tamt.main, *argv)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("objective,rank", [("mlm", "global"), ("kd", "local"), ("mlm+kd", "global")])
def test_exact_after_every_step_and_frozen_weights(world, monkeypatch, family, objective, rank):
    frozen, counts, pooler = {}, [], []
    train, rank_now = tamt.train, tamt.Scores.rank

    def watched(model, vocab, layers, *rest):
        frozen["before"] = {n: p.detach().clone() for n, p in model.named_parameters() if "scores" not in n}
        train(model, vocab, layers, *rest)
        frozen["after"] = dict(model.named_parameters())

    def counted(self, *reach, **more):
        before = self.mask.clone()
        rank_now(self, *reach, **more)
        counts.append(int((~self.mask).sum()))
        pooler.append(torch.equal(before[-32 * 32:], self.mask[-32 * 32:]))
    monkeypatch.setattr(tamt, "train", watched)
    monkeypatch.setattr(tamt.Scores, "rank", counted)
    out = f"exact-{family}-{objective}-{rank}"
    assert find(world, "--objective", objective, "--rank", rank, "--lr", 2e-3, family=family, out=out) == 0
    masks, report = tamt.load_mask(world / out / "mask.pt"), json.loads((world / out / "mask.json").read_text())
    sizes = [mask.numel() for mask in masks.values()]
    exact = sum(round(n * 0.7) for n in sizes) if rank == "local" else round(sum(sizes) * 0.7)
    assert counts[1:] == [exact] * 12 and all(pooler[1:])
    assert all(torch.equal(p, frozen["after"][name]) for name, p in frozen["before"].items())
    assert report["sparsity"]["pruned"] == exact == sum(int((~mask).sum()) for mask in masks.values())
    lines = [json.loads(line) for line in (world / out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12] and lines[-1]["flips"] > 0
    assert {"dev_mlm_loss", "dev_kd_loss"} <= report.keys()
    assert (world / out / "step-5" / "mask.pt").exists() and (world / out / "step-10" / "mask.pt").exists()


def test_learning_beats_the_start_on_its_own_objective(world):
    for objective, key in (("mlm", "dev_mlm_loss"), ("kd", "dev_kd_loss")):
        losses = {}
        for method, more in (("omp", ()), ("tamt", ("--objective", objective))):
            assert find(world, *more, steps=150, out=f"worth-{method}-{objective}", method=method) == 0
            losses[method] = json.loads((world / f"worth-{method}-{objective}" / "mask.json").read_text())[key]
        assert losses["tamt"] < 0.97 * losses["omp"], losses


def test_a_short_run_at_the_papers_lr_flips_nothing(world):
    assert find(world, "--objective", "kd", "--lr", 2e-5, out="still") == 0
    assert find(world, method="omp", out="start") == 0
    a, b = (tamt.load_mask(world / name / "mask.pt") for name in ("still", "start"))
    assert sum(int((a[name] ^ b[name]).sum()) for name in a) <= len(a)  # what rounding per matrix moves


def test_refresh_every_lets_the_sparsity_drift_and_saves_exact_masks(world, monkeypatch):
    drift, gate = [], tamt.Scores.gate
    monkeypatch.setattr(tamt.Scores, "gate", lambda self: (gate(self), drift.append(int((~self.mask).sum()))))
    assert find(world, "--refresh-every", 6, "--lr", 4e-3, out="drift") == 0
    report = json.loads((world / "drift" / "mask.json").read_text())["sparsity"]
    assert report["pruned"] == round(report["entries"] * 0.7) and len({*drift}) > 1


@pytest.mark.parametrize("s", [0.0, 0.999])
def test_extreme_sparsities(world, s, capsys):
    assert find(world, "--sparsity", s, "--objective", "kd", steps=3, out=f"s{s}") == 0
    report = json.loads((world / f"s{s}" / "mask.json").read_text())
    assert report["sparsity"]["pruned"] == round(report["sparsity"]["entries"] * s)
    assert (report["dev_kd_loss"] < 1e-6) == (s == 0.0)


def test_imp_is_nested_exact_and_rewinds(world):
    for more, out in (((), "imp"), (("--no-rewind", "--rank", "global"), "imp-on")):
        assert find(world, "--prune-every", 3, "--sparsity", 0.35, *more, method="imp", out=out, steps=30) == 0
        levels = [tamt.load_mask(world / out / f"step-{step}" / "mask.pt") for step in (0, 3, 6, 9)]
        for level, masks in zip((0.1, 0.2, 0.3, 0.35), levels, strict=True):
            sizes = [mask.numel() for mask in masks.values()]
            exact = round(sum(sizes) * level) if more else sum(round(n * level) for n in sizes)
            assert sum(int((~mask).sum()) for mask in masks.values()) == exact
        for before, after in itertools.pairwise(levels):
            assert not any((after[name] & ~before[name]).any() for name in after)
        final = tamt.load_mask(world / out / "mask.pt")
        assert all(torch.equal(final[name], levels[-1][name]) for name in final)
    rewound, onward = (tamt.load_mask(world / out / "step-9" / "mask.pt") for out in ("imp", "imp-on"))
    assert any(not torch.equal(rewound[name], onward[name]) for name in rewound)


@pytest.mark.parametrize("method,more", [("tamt", ("--objective", "mlm+kd", "--lr", 1e-3)), ("imp", ("--prune-every", 4)),
                                         ("tamt", ("--refresh-every", 4, "--lr", 4e-3))])
def test_resume_is_bit_for_bit(world, monkeypatch, method, more):
    out = f"resume-{method}{more[1]}"
    assert find(world, *more, method=method, out=f"{out}-whole") == 0
    batch, calls = tamt.Batch, itertools.count()

    def interrupted(*args):
        if next(calls) == 8:
            raise KeyboardInterrupt
        return batch(*args)
    monkeypatch.setattr(tamt, "Batch", interrupted)
    assert find(world, *more, method=method, out=out) == 130
    monkeypatch.setattr(tamt, "Batch", batch)
    assert find(world, *more, method=method, out=out) == 2  # unfinished: says so instead of starting over
    assert find(world, *more, "--resume", "--clip", 0.5, method=method, out=out) == 2  # other settings
    assert find(world, *more, "--resume", method=method, out=out) == 0
    assert (world / out / "mask.pt").read_bytes() == (world / f"{out}-whole" / "mask.pt").read_bytes()
    logs = [[{k: v for k, v in json.loads(line).items() if k not in ("time", "ms_per_step")}
             for line in (world / name / "log.jsonl").read_text().splitlines()] for name in (out, f"{out}-whole")]
    assert logs[0] == logs[1]
    stamp = (world / out / "mask.pt").stat().st_mtime_ns
    assert find(world, *more, "--resume", method=method, out=out) == 0  # finished: nothing changes
    assert (world / out / "mask.pt").stat().st_mtime_ns == stamp


def test_accumulation_and_two_processes_equal_one_big_batch(world, tmp_path):
    """Without dropout the same sequences give the same update, whichever way they are shared out."""
    tiny(tmp_path / "dry", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    common = ["--model", tmp_path / "dry", "--data", world / "text.txt", "--steps", 4, "--seq-len", 16, "--lr", 1e-3,
              "--objective", "mlm+kd", "--device", "cpu"]
    assert run(tamt.main, *common, "--batch-size", 8, "--out", tmp_path / "a") == 0
    assert run(tamt.main, *common, "--batch-size", 2, "--accumulate", 4, "--out", tmp_path / "b") == 0
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "tamt.py",
                    *map(str, common), "--batch-size", "8", "--out", tmp_path / "c"], check=True, capture_output=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    masks = [tamt.load_mask(tmp_path / name / "mask.pt") for name in "abc"]
    entries = sum(mask.numel() for mask in masks[0].values())
    losses = [json.loads((tmp_path / name / "mask.json").read_text())["dev_mlm_loss"] for name in "abc"]
    for other, loss in zip(masks[1:], losses[1:], strict=True):
        assert sum(int((masks[0][n] ^ other[n]).sum()) for n in other) <= 1e-3 * entries
        assert abs(loss - losses[0]) < 1e-3


# ---------------------------------------------------------------- tamt: mask files, export, bad input


def test_mask_files(world, tmp_path, model):
    layers = tamt.mask_model(model)
    masks = tamt.random_masks(layers, 0.6, "local", 3)
    for name in "ab":
        tamt.save_mask(tmp_path / name, masks, {"model": "x", "seed": 3})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    raw = torch.load(tmp_path / "a", weights_only=True)
    name = next(iter(masks))
    assert raw["format"] == 1 and raw["shapes"][name] == list(masks[name].shape)
    assert np.array_equal(np.unpackbits(raw["bits"][name].numpy(), count=masks[name].numel()), masks[name].flatten())
    foreign = {"plain": masks, "prune": {f"{n}_mask": m.float() for n, m in masks.items()},
               "part": {n: m for n, m in masks.items() if "word_embeddings" not in n}}
    for kind, content in foreign.items():
        torch.save(content, tmp_path / kind)
        loaded = tamt.load_mask(tmp_path / kind)
        assert loaded.keys() == {n.removesuffix("_mask") for n in content}
        assert all(torch.equal(loaded[n], masks[n]) for n in loaded)
        tamt.fit_masks(layers, loaded, kind)
    query = next(n for n in masks if "query" in n)
    for change, what in (({query: None}, "missing: .*query"), ({"bert.x.weight": masks[name]}, "unexpected: bert.x"),
                         ({query: masks[query][:5]}, "wrong shape: .*query.*5, 32.*32, 32")):
        changed = {n: m for n, m in (masks | change).items() if m is not None}
        with pytest.raises(ValueError, match=what):
            tamt.fit_masks(layers, changed, "f")
    for content in ({query: masks[query].float() * 2}, {"x": torch.ones(2)}, [1], {}, {"format": 2}):
        torch.save(content, tmp_path / "bad")
        with pytest.raises(ValueError, match="bad"):
            tamt.load_mask(tmp_path / "bad")
    assert tamt.similarity(masks, masks) == 1.0
    flipped = {n: ~m for n, m in masks.items()}
    assert tamt.similarity(masks, flipped) == 0.0
    none = {n: torch.zeros_like(m) for n, m in masks.items()}
    assert tamt.similarity(none, none) == 1.0


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_export_loads_in_transformers(world, tmp_path, family):
    from transformers import AutoModelForMaskedLM, AutoTokenizer
    assert find(world, family=family, method="omp", out=f"omp-{family}") == 0
    mask = world / f"omp-{family}" / "mask.pt"
    for more, folder in ((("--mask", mask), "sparse"), ((), "whole")):
        argv = ["--model", world / family, "--data", world / "text.txt", "--seq-len", 16, *more]
        assert run(tamt.main, *argv, "--evaluate", "--export", tmp_path / folder) == 0
    theirs, notes = AutoModelForMaskedLM.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not notes["missing_keys"]
    ours = bert.load(world / family)
    layers = tamt.mask_model(ours)
    tamt.set_masks(layers, tamt.load_mask(mask))
    ids, _ = small_batch(ours)
    with torch.no_grad():
        expected = ours.mlm_logits(ours(ids)[-1])
        assert (theirs(ids).logits - expected).abs().max() < 1e-5
        again = bert.load(tmp_path / "sparse")  # and in ours, untied
        assert torch.equal(again.mlm_logits(again(ids)[-1]), expected)
    vocab, tokenizer = data.vocabulary(world / family), AutoTokenizer.from_pretrained(tmp_path / "sparse")
    assert tokenizer("the cat sees")["input_ids"][1:-1] == vocab.tokenizer.encode("the cat sees", add_special_tokens=False).ids
    assert run(tamt.main, "--model", world / family, "--mask", mask, "--export", tmp_path / "packed", "--packed") == 0
    tensors, base = tamt.unpack_export(tmp_path / "packed" / "model.safetensors"), dict(again.named_parameters())
    assert all(torch.equal(t, base[name]) for name, t in tensors.items()) and len(tensors) == len(
        [n for n in base if n.startswith(family)])


BAD = {  # arguments -> what the one line says
    "unknown model": (["--model", "bert-huge"], "bert-huge.*bert-base.*toy"),
    "sparsity 1": (["--sparsity", "1.0"], "1.0.*\\[0, 1\\)"),
    "sparsity -0.1": (["--sparsity", "-0.1"], "-0.1"),
    "sparsity 70": (["--sparsity", "70"], "70.*\\[0, 1\\)"),
    "unknown flag": (["--sparsty", "0.5"], "sparsty"),
    "unknown method": (["--method", "magic"], "magic.*tamt.*imp"),
    "no steps": (["--steps", "0"], "0.*positive whole"),
    "missing corpus": (["--data", "no/such.txt"], "no/such.txt.*wikitext-103"),
    "long rows": (["--seq-len", "65"], "65.*64"),
    "mask alone": (["--mask", "x.pt"], "--mask.*--evaluate"),
    "missing mask": (["--evaluate", "--mask", "no.pt"], "no.pt"),
    "missing compare": (["--compare", "no.pt"], "no.pt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_one_line(world, capsys, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, message = BAD[case]
    base = ["--model", world / "bert", "--data", world / "text.txt", "--seq-len", "16", "--out", tmp_path / "out"]
    assert run(tamt.main, *base, *argv) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    assert __import__("re").search(message, error), error
    assert not (tmp_path / "out" / "mask.pt").exists() and not list(tmp_path.rglob("*.part"))


def test_bad_files_are_one_line(world, capsys, tmp_path):
    good = {"model": world / "bert", "data": world / "text.txt"}
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("the cat\nsees\n")
    for name in ("config", "short", "vocab"):
        tiny(tmp_path / name)
    config = json.loads((tmp_path / "config" / "config.json").read_text())
    del config["hidden_size"]
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "short" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with open(tmp_path / "vocab" / "vocab.txt", "a") as file:
        file.write("more\n")
    cases = [({"data": tmp_path / "empty.txt"}, "empty.txt"), ({"data": tmp_path / "short.txt"}, "short.txt.*16 tokens"),
             ({"model": tmp_path / "config"}, "config.json.*hidden_size"), ({"model": tmp_path / "short"}, "model.safetensors"),
             ({"model": tmp_path / "vocab"}, "vocabulary of")]
    for change, message in cases:
        files = good | change
        code = run(tamt.main, "--model", files["model"], "--data", files["data"], "--seq-len", 16, "--out", tmp_path / "o")
        error = capsys.readouterr().err.strip()
        assert code == 2 and __import__("re").search(message, error) and "\n" not in error, error
        assert not (tmp_path / "o").exists()


def test_a_full_disk_keeps_the_old_mask(world, tmp_path):
    code = """
import resource, sys, tamt, torch
masks = {"bert.encoder.layer.0.output.dense.weight": torch.ones(2000, 1000, dtype=torch.bool)}
tamt.save_mask(sys.argv[1], masks, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
tamt.run(lambda: tamt.save_mask(sys.argv[1], masks, {"again": True}))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "mask.pt"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "mask.pt" in done.stderr
    assert tamt.read_mask(tmp_path / "mask.pt")[1] == {} and [f.name for f in tmp_path.iterdir()] == ["mask.pt"]


def test_a_loss_that_is_not_finite_stops_the_run(world, capsys, monkeypatch):
    monkeypatch.setattr(tamt, "mlm_loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    assert find(world, out="nan") == 2
    assert "step 1" in (error := capsys.readouterr().err) and "--lr" in error
    assert not (world / "nan" / "mask.pt").exists()


def test_imports_are_what_the_design_says():
    project = {"bert", "data", "tamt", "glue_squad", "finetune", "dev"}
    allowed = {"bert": set(), "data": set(), "tamt": {"bert", "data", "dev"}, "glue_squad": {"data"},
               "finetune": {"bert", "data", "tamt", "glue_squad", "dev"}}
    for name, ours in allowed.items():
        nodes = list(ast.walk(ast.parse((ROOT / f"{name}.py").read_text())))
        found = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
        found |= {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
        assert found & project <= ours
        assert found - project - sys.stdlib_module_names <= {"torch", "numpy", "tokenizers", "requests"}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_the_cpu(world):
    results = []
    for device in ("cpu", "cuda"):
        assert find(world, "--device", device, "--dtype", "fp32", "--objective", "mlm+kd", out=f"on-{device}") == 0
        assert find(world, "--device", device, method="omp", out=f"omp-{device}") == 0
        results.append([tamt.load_mask(world / f"{kind}-{device}" / "mask.pt") for kind in ("omp", "on")])
    (omp, learned), (omp_cuda, learned_cuda) = results
    assert all(torch.equal(omp[name], omp_cuda[name]) for name in omp)
    assert tamt.similarity(learned, learned_cuda) > 0.98
    values = torch.randint(-5, 5, (10_000,)).float()
    for prune in (1, 3333, 9999):
        assert torch.equal(tamt.keep_mask(values.cuda(), prune)[0].cpu(), tamt.keep_mask(values, prune)[0])
