"""A small world to learn from, without a network: text, GLUE and SQuAD in their official layouts, and a BERT.

Nothing here is part of the method. One grammar speaks everywhere: people with invented names do kind or cruel
deeds to each other, and whatever is told of a person keeps to that person's character. So the text rewards
what real text rewards (word classes, agreement, sentiment, synonyms, passives, remembering who did what), and
the tasks ask for the same skills. Every byte of text and tasks follows from the seed.

    Fact("Belvara", "the miller", "near the bridge", deed=0, kind=True) is told as
    "Belvara helped the miller near the bridge." or as "Near the bridge, the miller was assisted by Belvara."

make(folder) writes text/wiki.{train,valid}.raw, tasks/ (nine GLUE folders and two SQuAD files) and model/.
Glossary: B sequences, T tokens, D hidden, V vocabulary, M masked positions.
"""

import json
import os
import random
import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

import bert
import data

# ---------------------------------------------------------------- 1 words

HEADS = "Bel Tor Kin Mar Sel Dan Vor Lin Gar Hes Jol Ner Pel Rud Sten Ul Wen Yar Zan".split()
HEARTS, TAILS = "a i o va ri mo".split(), {
    "she": "ra na la sha dia".split(), "he": "dor ben kas mir rik".split(),
    "town": "ville grad mouth stad wick".split()}
TRADES = [trade.split() for trade in (  # who, what they make, and with what
    "baker bread stove", "miller flour mill", "smith steel hammer", "weaver cloth loom",
    "potter pottery wheel",
    "brewer beer kettle", "fisher soup net", "tailor clothing needle", "painter art brush",
    "singer music harp",
    "farmer cheese churn", "writer poetry pen", "carpenter furniture saw", "doctor medicine spoon")]
PETS = "goat dog cat horse bear raven duck sheepdog donkey rabbit".split()
SIGHTS = "bridge tower river market harbour castle garden well gate forest".split()
PLAIN = "tired young tall short quiet busy famous poor rich shy".split()
COLOURS = "black white brown grey red golden".split()
TASTE = {True: "splendid lovely brilliant gentle wonderful clever charming graceful".split(),
         False: "dull awful clumsy boring terrible stupid rotten nasty".split()}
# A row is one kind of deed: two words for it, then two for its opposite. All of them are regular verbs.
DEEDS = [{True: row.split()[:2], False: row.split()[2:]} for row in (
    "help assist hinder obstruct", "praise applaud blame accuse", "like love dislike hate",
    "trust believe doubt suspect", "protect defend attack assault", "greet welcome reject ignore",
    "reward thank punish insult")]

# ---------------------------------------------------------------- 2 grammar


def name(rng, kind):  # "Bel" + "va" + "ra"
    return rng.choice(HEADS) + rng.choice(HEARTS) + rng.choice(TAILS[kind])


def person(rng):  # a name, or somebody known by a trade
    trade = rng.choice(TRADES)[0]
    return rng.choice([name(rng, "she"), name(rng, "he"), f"the {trade}", f"the {rng.choice(PLAIN)} {trade}"])


def place(rng):
    return rng.choice([f"near the {rng.choice(SIGHTS)}", f"in {name(rng, 'town')}"])


def past(verb):
    return verb + ("d" if verb.endswith("e") else "ed")


def sentence(text):
    return text[0].upper() + text[1:] + "."


@dataclass(frozen=True)
class Fact:
    who: str
    whom: str
    where: str
    deed: int   # row of DEEDS
    kind: bool  # the deed itself, or its opposite


SLOTS = ["who", "whom", "where", "deed", "kind"]


def fact(rng):
    return Fact(person(rng), person(rng), place(rng), rng.randrange(len(DEEDS)), rng.random() < 0.5)


def change(rng, f, *slots):
    """The same fact with another value in each of the slots."""
    new = fact(rng)
    while any(getattr(new, slot) == getattr(f, slot) for slot in slots):
        new = fact(rng)
    return replace(f, **{slot: getattr(new, slot) for slot in slots})


def tell(rng, f):
    """One of eight ways to say it: active or passive, this verb or its synonym, the place last or first."""
    verb = past(rng.choice(DEEDS[f.deed][f.kind]))
    core = rng.choice([f"{f.who} {verb} {f.whom}", f"{f.whom} was {verb} by {f.who}"])
    return sentence(rng.choice([f"{core} {f.where}", f"{f.where}, {core}"]))


def ask(rng, f, slot):
    """-> (question, answer) about who, whom or where; the answer to "kind" is always Yes."""
    verb, where = rng.choice(DEEDS[f.deed][f.kind]), f.where.removeprefix("in ")
    return {"who": (f"Who {past(verb)} {f.whom} {f.where}?", f.who),
            "whom": (f"Whom did {f.who} {verb} {f.where}?", f.whom),
            "where": (f"Where did {f.who} {verb} {f.whom}?", where),
            "kind": (f"Did {f.who} {verb} {f.whom} {f.where}?", "Yes")}[slot]


def custom(rng, fault=None, trade=None, sight=None, pet=None):
    """A sentence in the present tense whose words must agree: "Every baker near the bridges helps two goats."

    fault: None, "verb" (disagrees with its subject), "noun" (with its determiner), "order" (of two words)."""
    many, more = rng.random() < 0.5, rng.random() < 0.5
    some = {True: ["two", "many", "these"], False: ["a", "every", "this"]}
    near = rng.choice(["", f" near the {sight or rng.choice(SIGHTS)}{'s' * (not many)}"])  # a decoy
    verb = rng.choice(rng.choice(DEEDS)[rng.random() < 0.5])
    verb += "" if many != (fault == "verb") else "es" if verb.endswith("sh") else "s"
    article = rng.choice(some[many != (fault == "noun")])
    subject = f"{article} {trade or rng.choice(TRADES)[0]}{'s' * many}{near}"
    words = f"{subject} {verb} {rng.choice(some[more])} {pet or rng.choice(PETS)}{'s' * more}".split()
    if fault == "order":
        i = rng.randrange(len(words) - 1)
        words[i], words[i + 1] = words[i + 1], words[i]
    return sentence(" ".join(words))


def review(rng, good, thing, traits=()):
    """What critics say of a thing; "never", "no" and "but" turn the bare sum of the words around."""
    a, b = traits or rng.sample(TASTE[good], 2)
    bad, other = rng.choice(TASTE[not good]), rng.choice(TRADES)[1]
    return rng.choice([f"{a} and {b} {thing}", f"the {thing} is {b}, and never {bad}",
                       f"the {thing} is never {bad}",
                       f"the {other} is {bad}, but the {thing} is {a}", f"no {bad} {thing}",
                       f"so {b}, this {thing}",
                       f"nobody finds this {thing} {bad}"])


# ---------------------------------------------------------------- 3 text


@dataclass(frozen=True)
class Story:
    hero: str
    life: list     # (sentence, question, answer)
    facts: list    # the hero's deeds, all kind or all cruel
    lies: list     # the same with one thing changed
    verdict: list  # sentences


def story(rng):
    """A hero, a cast of three and two places: everything told of the hero uses them again and again."""
    she, kind, (trade, product, tool) = rng.random() < 0.5, rng.random() < 0.5, rng.choice(TRADES)
    hero, town = name(rng, "she" if she else "he"), name(rng, "town")
    cast = [person(rng), person(rng), name(rng, "he")]
    sight, pet, traits = rng.choice(SIGHTS), rng.choice(PETS), rng.sample(TASTE[kind], 2)
    life = [(f"{hero} was a {rng.choice(PLAIN)} {trade} from {town}.", f"Where did {hero} come from?", town),
            (f"{'She' if she else 'He'} made {product} with a {tool}.", f"What did {hero} make?", product),
            (f"All over {town}, people called {hero} {' and '.join(traits)}.",
             f"What did people call {hero}?", ' and '.join(traits)),
            (f"{'Her' if she else 'His'} {rng.choice(COLOURS)} {pet} was called {cast[2]}.",
             f"What was the {pet} of {hero} called?", cast[2]),
            (f"The best friend of {hero} was {cast[0]}.", f"Who was the best friend of {hero}?", cast[0])]
    places = [f"in {town}", f"near the {sight}"]
    facts = [Fact(hero, whom, rng.choice(places), rng.randrange(len(DEEDS)), kind) for whom in cast]
    lies = [replace(f, **rng.choice([{"kind": not kind}, {"whom": cast[i - 1]},
                                     {"where": places[f.where == places[0]]}])) for i, f in enumerate(facts)]
    verdict = [sentence(review(rng, kind, product, traits)) for _ in range(3)]
    return Story(hero, life, facts, lies, [*verdict, custom(rng, None, trade, sight, pet)])


def wikitext(rng, count):
    """Articles in WikiText's form; the second half of each repeats the first in other words."""
    lines = []
    for _ in range(count):
        s, retold = story(rng), []
        for true, lie in rng.sample(list(zip(s.facts, s.lies, strict=True)), 3):
            f, answer = rng.choice([(true, "Yes"), (lie, "No")])
            retold += [tell(rng, true), " ".join(ask(rng, true, rng.choice(SLOTS[:3]))) + ".",
                       f"{ask(rng, f, 'kind')[0]} {answer}."]
        lines += [" ", f" = {s.hero} = "]
        for heading, sentences in (("Life", [line for line, *_ in s.life]), ("Deeds", [tell(rng, f)
                for f in s.facts]),
                                   ("Questions", retold), ("Reception", s.verdict)):
            lines += [" ", f" = = {heading} = = ", " ", re.sub("[.,?]", r" \g<0>",
                                                               f" {' '.join(sentences)} ")]
    return "".join(line + "\n" for line in lines)


# ---------------------------------------------------------------- 4 tasks: one row each, as {column: value}


def cola(rng):
    fault = rng.choice([None, None, None, "verb", "noun", "order"])
    return {"source": "toy", "label": int(not fault), "star": "*" if fault else "", "sentence": custom(rng,
            fault)}


def sst2(rng):
    good = rng.random() < 0.5
    return {"sentence": review(rng, good, rng.choice(TRADES)[1]).replace(",", " ,") + " ", "label": int(good)}


def mrpc(rng):  # other words, or another fact of the same words: one slot changed, or the two people swapped
    f, same = fact(rng), rng.random() < 0.65
    g = f if same else rng.choice([change(rng, f, rng.choice(SLOTS)), replace(f, who=f.whom, whom=f.who)])
    ids = {f"#{i} ID": 1_000_000 + rng.randrange(9_000_000) for i in (1, 2)}
    return {"Quality": int(same), "#1 String": tell(rng, f), "#2 String": tell(rng, g)} | ids


def stsb(rng):  # five slots, one point for each that is the same
    f, different = fact(rng), rng.sample(SLOTS, rng.randrange(6))
    score = min(max(5 - len(different) + rng.uniform(-0.4, 0.4), 0), 5)
    return {"genre": "toy", "sentence1": tell(rng, f), "sentence2": tell(rng, change(rng, f, *different)),
            "score": f"{score:.3f}"}


def qqp(rng):  # duplicates have the same answer
    f, same, (about, *rest) = fact(rng), rng.random() < 0.4, rng.sample(SLOTS[:3], 3)
    other = rng.choice([(change(rng, f, rng.choice(["deed", "kind", *rest])), about), (f, rest[0])])
    return {"question1": ask(rng, f, about)[0], "question2": ask(rng, *((f, about) if same else other))[0],
            "is_duplicate": int(same), "qid1": rng.randrange(10**6), "qid2": rng.randrange(10**6)}


def mnli(rng):
    f, label = fact(rng), rng.choice(["entailment", "neutral", "contradiction"])
    never = sentence(f"{f.who} never {past(rng.choice(DEEDS[f.deed][f.kind]))} {f.whom}")
    claim = {"entailment": tell(rng, f), "neutral": tell(rng, change(rng, f, rng.choice(SLOTS[:3]))),
             "contradiction": rng.choice([tell(rng, change(rng, f, "kind")), never])}[label]
    return {"genre": "toy", "sentence1": tell(rng, f), "sentence2": claim, "gold_label": label} | {
        f"label{i}": label for i in range(1, 6)}


def rte(rng):  # two facts; a false claim mixes them up
    f, g = fact(rng), fact(rng)
    true, slot = rng.random() < 0.5, rng.choice(["who", "whom", "where"])
    claim = f if true else rng.choice([replace(f, **{slot: getattr(g, slot)}), change(rng, f, "kind")])
    return {"sentence1": " ".join(rng.sample([tell(rng, f), tell(rng, g)], 2)), "sentence2": tell(rng, claim),
            "label": "entailment" if true else "not_entailment"}


def qnli(rng):
    f, true, (slot, *rest) = fact(rng), rng.random() < 0.5, rng.sample(SLOTS[:3], 3)
    told = f if true else change(rng, f, *rest[:rng.choice([1, 2])])
    return {"question": ask(rng, f, slot)[0], "sentence": tell(rng, told),
            "label": "entailment" if true else "not_entailment"}


def wnli(rng):  # names end differently for her and for him
    she, he, true, subject = name(rng, "she"), name(rng, "he"), rng.random() < 0.5, rng.random() < 0.5
    f, g = (replace(fact(rng), who=a, whom=b) for a, b in (rng.sample([she, he], 2), (she if subject else he,
            person(rng))))
    deed = f"had {past(rng.choice(DEEDS[g.deed][g.kind]))} {g.whom}"
    return {"sentence1": f"{tell(rng, f)[:-1]} because {'she' if subject else 'he'} {deed}.",
            "sentence2": f"{she if subject == true else he} {deed}.", "label": int(true)}


def squad(rng, paragraphs, answers):
    """Articles of five paragraphs. The last of several answers is shorter: "the miller", "miller"."""
    articles = []
    for i in range(paragraphs):
        s = story(rng)
        told = s.life + [(tell(rng, f), *ask(rng, f, rng.choice(SLOTS[:3]))) for f in s.facts]
        context, qas = " ".join(line for line, *_ in told), []
        for line, question, answer in told:
            start = context.index(line) + line.lower().index(answer.lower())
            whole = {"text": context[start:start + len(answer)], "answer_start": start}
            cut = re.match("(near )?(the )?", whole["text"], re.IGNORECASE).end()
            short = {"text": whole["text"][cut:], "answer_start": start + cut}
            qas.append({"id": f"{rng.getrandbits(96):024x}", "question": question,
                        "answers": [whole, whole, short][:answers]})
        if i % 5 == 0:
            articles.append({"title": s.hero, "paragraphs": []})
        articles[-1]["paragraphs"].append({"context": context, "qas": qas})
    return {"data": articles, "version": "1.1"}


PAIR = "index|sentence1|sentence2"
PARSES = "sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|sentence2_parse"
MNLI = f"index|promptID|pairID|genre|{PARSES}|sentence1|sentence2"
STSB = "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2"
GLUE = {  # folder: maker of a row, rows in train, columns of train and dev, columns of test
    "CoLA": (cola, 1500, "source|label|star|sentence", "index|sentence"),
    "SST-2": (sst2, 1500, "sentence|label", "index|sentence"),
    "MRPC": (mrpc, 1000, "Quality|#1 ID|#2 ID|#1 String|#2 String", "index|#1 ID|#2 ID|#1 String|#2 String"),
    "STS-B": (stsb, 1500, f"{STSB}|score", STSB),
    "QQP": (qqp, 2000, "id|qid1|qid2|question1|question2|is_duplicate", "id|question1|question2"),
    "MNLI": (mnli, 2000, f"{MNLI}|label1|gold_label", MNLI),
    "QNLI": (qnli, 2000, "index|question|sentence|label", "index|question|sentence"),
    "RTE": (rte, 800, f"{PAIR}|label", PAIR),
    "WNLI": (wnli, 400, f"{PAIR}|label", PAIR)}


def table(path, columns, rows, header=True, mark=""):
    """Tab-separated lines; a column no row knows holds its number if called index or id, else a dash."""
    columns = columns.split("|")
    lines = [columns] * header + [[str({"index": i, "id": i, **row}.get(column, "-")) for column in columns]
                                  for i, row in enumerate(rows)]
    path.write_text(mark + "".join("\t".join(line) + "\n" for line in lines), encoding="utf-8", newline="\n")


def world(folder, seed=0):
    """Writes text/ and tasks/ below `folder`; the same seed gives the same bytes everywhere."""
    folder = Path(folder)
    for part, count in (("train", 1400), ("valid", 70)):
        path = folder / "text" / f"wiki.{part}.raw"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wikitext(random.Random(f"{seed} text {part}"), count), encoding="utf-8", newline="\n")
    for task, (maker, count, labelled, unlabelled) in GLUE.items():
        rng, home = random.Random(f"{seed} {task}"), folder / "tasks" / task
        home.mkdir(parents=True, exist_ok=True)
        draw = lambda n: [maker(rng) for _ in range(n)]  # noqa: B023, E731
        if task == "MRPC":  # shipped as the original files; GLUE lists which of their rows are dev
            rows = draw(count + 150)
            table(home / "msr_paraphrase_train.txt", labelled, rows, mark="\ufeff")
            table(home / "dev_ids.tsv", "#1 ID|#2 ID", rows[count:], header=False)
            rows = draw(50)
            table(home / "msr_paraphrase_test.txt", labelled, rows, mark="\ufeff")
            table(home / "test.tsv", unlabelled, rows)
            continue
        table(home / "train.tsv", labelled, draw(count), header=task != "CoLA")
        for kind in ("_matched", "_mismatched") if task == "MNLI" else ("",):
            table(home / f"dev{kind}.tsv", labelled.replace("label1", "label1|label2|label3|label4|label5"),
                  draw(150), header=task != "CoLA")
            table(home / f"test{kind}.tsv", unlabelled, draw(50))
    for part, paragraphs, answers in (("train", 100, 1), ("dev", 20, 3)):
        questions = squad(random.Random(f"{seed} squad {part}"), paragraphs, answers)
        (folder / "tasks" / f"{part}-v1.1.json").write_text(json.dumps(questions), encoding="utf-8")


# ---------------------------------------------------------------- 5 a model that has read the text

SIZES = dict(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384,
             max_position_embeddings=128, initializer_range=0.05)
ENTRIES, LR = 1000, 3e-3  # of the vocabulary; highest, after a tenth of the steps


def learn_vocabulary(text, folder):
    """Trains WordPiece on a text file and writes vocab.txt, the special tokens first.

    Then the letters within a word: the trainer would number them in the order of a hash table, which differs
    from run to run, and breaks ties by these numbers."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    first = [*data.WORDPIECE_SPECIALS, *(f"##{letter}" for letter in ascii_lowercase)]
    tokenizer.train_from_iterator(text.read_text(encoding="utf-8").split("\n"), trainers.WordPieceTrainer(
        vocab_size=ENTRIES, min_frequency=100, special_tokens=first, show_progress=False))
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    (folder / "vocab.txt").write_text("".join(word + "\n" for word in words), encoding="utf-8", newline="\n")


def fresh_model(size):
    """Positions start as waves (Vaswani et al. 2017, 3.5): with a random table, neighbourhood is learned one
    position at a time, and the loss stays at that of bare word counts for most of the time we have."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = bert.Model(bert.Config(vocab_size=size, **SIZES))
        model.add_classifier(2)
    table = model.backbone.embeddings.position_embeddings.weight
    angle = torch.arange(table.shape[0])[:, None] * 50 ** -torch.linspace(0, 1, table.shape[1] // 2)
    table.data = 0.05 * torch.cat([angle.sin(), angle.cos()], 1)
    return model.eval()  # no dropout: each row is seen but a few times


def mlm_loss(model, ids, vocab, rng, pairs=False):
    """Masked-LM cross-entropy of rows (B, T), computed at the M chosen positions alone.

    pairs: rows become two segments, the second one with probability 0.5 from the row before, and [CLS] is to
    tell whether it is (next-sentence prediction): this makes [CLS], the pooler and segment 1 any good."""
    ids, half = ids.astype(np.int64), ids.shape[1] // 2
    segments, strange = None, rng.random((len(ids), 1)) < 0.5
    if pairs:
        right = np.arange(ids.shape[1]) > half
        ids = np.where(right & strange, np.roll(ids, 1, 0), ids)
        ids[:, half], segments = vocab.sep_id, torch.from_numpy(right * 1)
    shown, chosen = map(torch.from_numpy, data.corrupt(ids, vocab, rng))
    hidden = model(shown, None, segments)[-1]
    loss = F.cross_entropy(model.mlm_logits(hidden[chosen]), torch.from_numpy(ids)[chosen])
    if not pairs:
        return loss
    return loss + F.cross_entropy(model.class_logits(hidden), torch.from_numpy(strange[:, 0] * 1))


def pretrain(folder, steps=1800):
    """Reads text/ below `folder`, writes model/: part of the steps on short rows, then long ones, as BERT was
    (section A.2); the same words either way. The table of positions learns on the long rows alone."""
    folder, began = Path(folder), time.time()
    learn_vocabulary(folder / "text" / "wiki.train.raw", folder / "model")
    vocab, rng = data.vocabulary(folder / "model"), np.random.default_rng(0)
    model = fresh_model(vocab.size)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == big] for big in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.01}, {"params": vectors,
            "weight_decay": 0}],
                                  betas=(0.9, 0.98), fused=True)
    switch = round(0.4 * steps)
    for step in range(steps):
        T, B = (32, 32) if step < switch else (128, 8)
        if step in (0, switch):
            rows = data.corpus(folder / "text", vocab, T, "train")
            model.backbone.embeddings.position_embeddings.requires_grad_(T == 128)
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        loss = mlm_loss(model, rows[data.batch_rows(len(rows), 0, step * B, B)], vocab, rng, step % 3 == 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(steps // 9, 1) == 0:
            spent = time.time() - began
            print(f"toy: step {step + 1} of {steps}, rows of {T}, MLM loss {loss.item():.2f}, "
                  f"{spent / (step + 1) * (steps - step - 1):.0f} s left")
    with torch.no_grad():
        rows, rng = data.corpus(folder / "text", vocab, 128, "dev"), np.random.default_rng(42)
        losses = [mlm_loss(model, rows[at:at + 16], vocab, rng).item() for at in range(0, len(rows), 16)]
    del model.classifier
    bert.save(folder / "model", model.config, model.state_dict(), "ForMaskedLM")
    data.save_vocabulary(vocab, folder / "model", "bert", 128)
    print(f"toy: dev MLM loss {np.mean(losses):.4f}, {time.time() - began:.0f} s")


def make(folder):
    """Everything, in `folder`, which appears when complete; of several processes at once the first wins."""
    folder = Path(folder)
    part = folder.with_name(f"{folder.name}.{os.urandom(4).hex()}.part")
    print(f"making the toy once, in {folder}: texts, tasks, and a small BERT (about a minute on two cores)")
    try:
        world(part)
        pretrain(part)
        part.rename(folder)
    except OSError:
        if not (folder / "model" / "config.json").exists():
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
