"""Makes the folders of the README's headline: rxnfp, a BERT for chemical reactions, and their text and task.

    pip download rxnfp==0.1.0 --no-deps
    pip install rdkit==2026.9.1
    python dev/reactions.py rxnfp-0.1.0-py3-none-any.whl valid.csv test.csv

valid.csv and test.csv are those of https://github.com/uta-smile/RetroXpert, in data/USPTO50K/canonicalized_csv. Written
into the current folder:

    rxnfp       the network: its files as in the wheel, and a tokenizer.json
    rxn         text to train masks on: wiki.train.tokens, the 5,001 reactions of valid.csv, and wiki.valid.tokens, the
                first 1,500 of test.csv
    rxn-task    a task with ten classes: train.tsv, the same 5,001, and dev.tsv, the first 1,000 of test.csv
"""

import csv
import json
import re
import sys
import zipfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors

NUM_DEV_LINES = 1500
NUM_DEV_EXAMPLES = 1000

# A token of SMILES is an atom, in brackets or without, or a bond, a branch, the number of a ring.
TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|%\d\d|>>|.")


def write_network(wheel: str, folder: Path):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in ("config.json", "vocab.txt", "pytorch_model.bin"):
            (folder / name).write_bytes(archive.read(f"rxnfp/models/transformers/bert_pretrained/{name}"))
    make_tokenizer((folder / "vocab.txt").read_text().split("\n")).save(str(folder / "tokenizer.json"))


def make_tokenizer(words: list[str]) -> Tokenizer:
    """Splits at white space alone: BERT's own tokenizer would take [C@@H] to pieces."""
    ids = {word: index for index, word in enumerate(words) if word}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, ids[word]) for word in ("[CLS]", "[SEP]")])
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return tokenizer


def read_reactions(file: str) -> list[tuple[str, str]]:
    """(reaction, class) of each row: "C C O . Cl >> ...", "5"."""
    with open(file, newline="") as rows:
        return [(to_tokens(row["rxn_smiles"]), row["class"]) for row in csv.DictReader(rows)]


def to_tokens(reaction: str) -> str:
    reactants, product = reaction.split(">>")
    return " ".join(TOKEN.findall(f"{canonical(reactants)}>>{canonical(product)}"))


def canonical(smiles: str) -> str:
    """RDKit's spelling, without the numbers that say which atom of the product is which of the reactants."""
    from rdkit import Chem  # not one of the project's packages, and the tests do without it

    molecule = Chem.MolFromSmiles(smiles)
    for atom in molecule.GetAtoms():
        atom.SetAtomMapNum(0)
    return Chem.MolToSmiles(molecule)


def write_text(train: list, dev: list, folder: Path):
    folder.mkdir(exist_ok=True)
    for split, reactions in (("train", train), ("valid", dev[:NUM_DEV_LINES])):
        (folder / f"wiki.{split}.tokens").write_text("".join(f"{reaction}\n" for reaction, _ in reactions))


def write_task(train: list, dev: list, folder: Path):
    folder.mkdir(exist_ok=True)
    for split, reactions in (("train", train), ("dev", dev[:NUM_DEV_EXAMPLES])):
        rows = "".join(f"{reaction}\t{label}\n" for reaction, label in reactions)
        (folder / f"{split}.tsv").write_text(f"sentence\tlabel\n{rows}")
    (folder / "rxn.json").write_text(json.dumps({
        "name": "rxn", "columns": ["sentence"], "label": "label", "labels": [str(number) for number in range(1, 11)],
        "metric": "accuracy", "train": "train.tsv", "dev": "dev.tsv"}, indent=1))


def main(wheel: str, valid: str, test: str):
    write_network(wheel, Path("rxnfp"))
    train, dev = read_reactions(valid), read_reactions(test)
    write_text(train, dev, Path("rxn"))
    write_task(train, dev, Path("rxn-task"))


if __name__ == "__main__":
    main(*sys.argv[1:])
