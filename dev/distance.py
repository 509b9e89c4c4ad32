"""How far do masks move [CLS], the state that decides a classification?

    python dev/distance.py rxnfp rxn out/rxn/omp-0.7-s1 out/rxn/kd-0.7-s1

The cosine distance of the last hidden states under a mask from those of the whole network, mean over 200 lines of the
dev text: at [CLS], and over all tokens. Arguments: a model, a text that has a row on each line, masks. Each mask adds a
line to --results.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import tamt  # noqa: E402


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("masks", nargs="+")
    parser.add_argument("--results", default="dev/results.jsonl", help="(dev/results.jsonl)")
    args = parser.parse_args()

    model, vocabulary = tamt.load_model(args.model)
    layers = tamt.install_masked_layers(model)
    rows = data.corpus_rows(args.text, vocabulary, 128, "dev", one_row_per_line=True)[:200]
    input_ids = torch.from_numpy(rows.astype("int64"))
    is_token = input_ids != vocabulary.pad_id
    expected = model(input_ids, is_token)[-1]

    for mask in args.masks:
        entries, meta = tamt.read_mask(mask)
        if meta.get("method") == "super":
            parser.error(f"{mask}: a Super Ticket removes whole units, their biases, too")
        tamt.set_masks(layers, tamt.fit_masks(layers, entries, mask))
        found = model(input_ids, is_token)[-1]
        distances = 1 - F.cosine_similarity(found, expected, dim=-1)  # (rows, T)
        cls_distance = distances[:, 0].mean().item()
        distance = distances[is_token].mean().item()
        print(f"{mask}: {cls_distance:.3f} at [CLS], {distance:.3f} over all tokens")
        data.append_line(args.results, {
            "distance": mask, "model": args.model, "cls_distance": cls_distance, "token_distance": distance,
            "command": f"python dev/distance.py {args.model} {args.text} {mask}"})


if __name__ == "__main__":
    main()
