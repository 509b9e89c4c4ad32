"""A small world to learn from, without a network: text, GLUE and SQuAD in their official layouts, and a BERT.

    python tamt.py --model toy         # the first such run calls make(), which takes about a minute

Nothing here is part of the method. One grammar makes everything: people with invented names do kind or cruel deeds
to each other, and whatever a story says of its hero fits that hero's character. So the text rewards what real text
rewards (word classes, agreement, sentiment, synonyms, passives, remembering who did what), and the tasks ask for the
same skills. Every byte of text and tasks follows from the seed.

    Fact("Belvara", "the miller", "near the bridge", deed=0, is_kind=True) becomes
    "Belvara helped the miller near the bridge." or "Near the bridge, the miller was assisted by Belvara."

make(folder) writes text/wiki.{train,valid}.raw, tasks/ (nine GLUE folders and two SQuAD files) and model/.

Whoever edits this file: the draws from `rng` must stay in their order, or the toy becomes another one. Alternatives
for rng.choice() are all made before one is chosen, so those that are not chosen have drawn, too.

Letters: B sequences, T tokens, P predicted positions.
"""

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

import bert
import data

# ---------------------------------------------------------------------------------------------------
# 1. Words
# ---------------------------------------------------------------------------------------------------

# A name is a syllable of each kind: "Bel" + "va" + "ra".
FIRST_SYLLABLES = "Bel Tor Kin Mar Sel Dan Vor Lin Gar Hes Jol Ner Pel Rud Sten Ul Wen Yar Zan".split()
MIDDLE_SYLLABLES = "a i o va ri mo".split()
WOMAN = "ra na la sha dia".split()
MAN = "dor ben kas mir rik".split()
TOWN = "ville grad mouth stad wick".split()


class Trade(NamedTuple):
    person: str
    product: str
    tool: str


TRADES = [
    Trade("baker", "bread", "stove"),
    Trade("miller", "flour", "mill"),
    Trade("smith", "steel", "hammer"),
    Trade("weaver", "cloth", "loom"),
    Trade("potter", "pottery", "wheel"),
    Trade("brewer", "beer", "kettle"),
    Trade("fisher", "soup", "net"),
    Trade("tailor", "clothing", "needle"),
    Trade("painter", "art", "brush"),
    Trade("singer", "music", "harp"),
    Trade("farmer", "cheese", "churn"),
    Trade("writer", "poetry", "pen"),
    Trade("carpenter", "furniture", "saw"),
    Trade("doctor", "medicine", "spoon"),
]
PETS = "goat dog cat horse bear raven duck sheepdog donkey rabbit".split()
SIGHTS = "bridge tower river market harbour castle garden well gate forest".split()
ADJECTIVES = "tired young tall short quiet busy famous poor rich shy".split()
COLOURS = "black white brown grey red golden".split()
PRAISE = "splendid lovely brilliant gentle wonderful clever charming graceful".split()
SCORN = "dull awful clumsy boring terrible stupid rotten nasty".split()

# Each row is a deed: two words for it when it is kind, then two for its cruel opposite. All verbs are regular.
DEEDS = [
    "help assist hinder obstruct",
    "praise applaud blame accuse",
    "like love dislike hate",
    "trust believe doubt suspect",
    "protect defend attack assault",
    "greet welcome reject ignore",
    "reward thank punish insult",
]


def synonyms(deed, is_kind):  # row of DEEDS, bool -> two verbs
    verbs = DEEDS[deed].split()
    return verbs[:2] if is_kind else verbs[2:]


def past_tense(verb):
    return verb + "d" if verb.endswith("e") else verb + "ed"


def name(rng, last_syllables):
    return rng.choice(FIRST_SYLLABLES) + rng.choice(MIDDLE_SYLLABLES) + rng.choice(last_syllables)


def person(rng):
    """A name, or somebody known by a trade."""
    trade = rng.choice(TRADES).person
    people = [name(rng, WOMAN), name(rng, MAN), f"the {trade}", f"the {rng.choice(ADJECTIVES)} {trade}"]
    return rng.choice(people)


def place(rng):
    places = [f"near the {rng.choice(SIGHTS)}", f"in {name(rng, TOWN)}"]
    return rng.choice(places)


def sentence(text):
    return text[0].upper() + text[1:] + "."


# ---------------------------------------------------------------------------------------------------
# 2. Grammar: facts, and what can be said and asked about them
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    who: str
    whom: str
    where: str
    deed: int  # row of DEEDS
    is_kind: bool  # the deed itself, or its opposite


SLOTS = ["who", "whom", "where", "deed", "is_kind"]
NOUN_SLOTS = SLOTS[:3]


def random_fact(rng):
    return Fact(person(rng), person(rng), place(rng), rng.randrange(len(DEEDS)), rng.random() < 0.5)


def change(rng, fact, *slots):
    """The same fact with another value in each of the slots."""
    other = random_fact(rng)
    while any(getattr(other, slot) == getattr(fact, slot) for slot in slots):
        other = random_fact(rng)
    return replace(fact, **{slot: getattr(other, slot) for slot in slots})


def random_verb(rng, fact):
    return rng.choice(synonyms(fact.deed, fact.is_kind))


def tell(rng, fact):
    """One of eight ways to say it: active or passive, this verb or its synonym, the place last or first."""
    verb = past_tense(random_verb(rng, fact))
    active = f"{fact.who} {verb} {fact.whom}"
    passive = f"{fact.whom} was {verb} by {fact.who}"
    clause = rng.choice([active, passive])
    return sentence(rng.choice([f"{clause} {fact.where}", f"{fact.where}, {clause}"]))


def ask(rng, fact, slot):
    """-> (question, answer) about who, whom or where; the answer to "is_kind" is always Yes."""
    verb = random_verb(rng, fact)
    if slot == "who":
        return f"Who {past_tense(verb)} {fact.whom} {fact.where}?", fact.who
    if slot == "whom":
        return f"Whom did {fact.who} {verb} {fact.where}?", fact.whom
    if slot == "where":
        return f"Where did {fact.who} {verb} {fact.whom}?", fact.where.removeprefix("in ")
    return f"Did {fact.who} {verb} {fact.whom} {fact.where}?", "Yes"


def custom(rng, fault=None, trade=None, sight=None, pet=None):
    """A sentence in the present tense whose words must agree: "Every baker near the bridges helps two goats."

    fault: None, "verb" (disagrees with its subject), "noun" (with its determiner), "order" (of two words)."""
    subject_is_plural = rng.random() < 0.5
    object_is_plural = rng.random() < 0.5

    # Between subject and verb stands a noun of the other number, or nothing.
    sight = sight or rng.choice(SIGHTS)
    decoy = f" near the {sight}" if subject_is_plural else f" near the {sight}s"
    decoy = rng.choice(["", decoy])

    deed = rng.randrange(len(DEEDS))
    verb = rng.choice(synonyms(deed, rng.random() < 0.5))
    verb_is_plural = subject_is_plural != (fault == "verb")
    if not verb_is_plural:
        verb += "es" if verb.endswith("sh") else "s"

    subject_determiner = determiner(rng, subject_is_plural != (fault == "noun"))
    subject = inflect(trade or rng.choice(TRADES).person, subject_is_plural)
    object_determiner = determiner(rng, object_is_plural)
    patient = inflect(pet or rng.choice(PETS), object_is_plural)
    words = f"{subject_determiner} {subject}{decoy} {verb} {object_determiner} {patient}".split()

    if fault == "order":
        i = rng.randrange(len(words) - 1)
        words[i:i + 2] = [words[i + 1], words[i]]
    return sentence(" ".join(words))


def determiner(rng, is_plural):
    return rng.choice(["two", "many", "these"] if is_plural else ["a", "every", "this"])


def inflect(noun, is_plural):
    return noun + "s" if is_plural else noun


def review(rng, is_good, product, traits=None):
    """What critics say of a product; "never", "no" and "but" turn the bare sum of the words around."""
    fitting, opposite = (PRAISE, SCORN) if is_good else (SCORN, PRAISE)
    first, second = traits or rng.sample(fitting, 2)
    wrong = rng.choice(opposite)
    other = rng.choice(TRADES).product
    return rng.choice([
        f"{first} and {second} {product}",
        f"the {product} is {second}, and never {wrong}",
        f"the {product} is never {wrong}",
        f"the {other} is {wrong}, but the {product} is {first}",
        f"no {wrong} {product}",
        f"so {second}, this {product}",
        f"nobody finds this {product} {wrong}",
    ])


# ---------------------------------------------------------------------------------------------------
# 3. Text
# ---------------------------------------------------------------------------------------------------


class Statement(NamedTuple):
    sentence: str
    question: str
    answer: str


@dataclass(frozen=True)
class Story:
    hero: str
    life: list[Statement]
    facts: list[Fact]  # the hero's deeds, all kind or all cruel
    lies: list[Fact]  # the same with one thing changed
    verdict: list[str]  # sentences


def random_story(rng):
    """A hero, a cast of three and two places: all sentences about the hero use them again and again."""
    is_woman = rng.random() < 0.5
    is_kind = rng.random() < 0.5
    trade = rng.choice(TRADES)
    hero = name(rng, WOMAN if is_woman else MAN)
    town = name(rng, TOWN)
    cast = [person(rng), person(rng), name(rng, MAN)]
    sight = rng.choice(SIGHTS)
    pet = rng.choice(PETS)
    traits = rng.sample(PRAISE if is_kind else SCORN, 2)
    places = [f"in {town}", f"near the {sight}"]

    life = random_life(rng, hero, is_woman, trade, town, traits, pet, cast)
    facts = [Fact(hero, whom, rng.choice(places), rng.randrange(len(DEEDS)), is_kind) for whom in cast]
    lies = []
    for i, fact in enumerate(facts):
        other_place = places[1] if fact.where == places[0] else places[0]
        lies.append(rng.choice([
            replace(fact, is_kind=not is_kind),
            replace(fact, whom=cast[i - 1]),
            replace(fact, where=other_place),
        ]))
    verdict = [sentence(review(rng, is_kind, trade.product, traits)) for _ in range(3)]
    verdict.append(custom(rng, None, trade.person, sight, pet))
    return Story(hero, life, facts, lies, verdict)


def random_life(rng, hero, is_woman, trade, town, traits, pet, cast):
    pronoun = "She" if is_woman else "He"
    possessive = "Her" if is_woman else "His"
    traits = " and ".join(traits)
    friend, _, pet_name = cast
    return [
        Statement(f"{hero} was a {rng.choice(ADJECTIVES)} {trade.person} from {town}.",
                  f"Where did {hero} come from?", town),
        Statement(f"{pronoun} made {trade.product} with a {trade.tool}.",
                  f"What did {hero} make?", trade.product),
        Statement(f"All over {town}, people called {hero} {traits}.",
                  f"What did people call {hero}?", traits),
        Statement(f"{possessive} {rng.choice(COLOURS)} {pet} was called {pet_name}.",
                  f"What was the {pet} of {hero} called?", pet_name),
        Statement(f"The best friend of {hero} was {friend}.",
                  f"Who was the best friend of {hero}?", friend),
    ]


def wikitext(rng, num_articles):
    """Articles in WikiText's form; the second half of each repeats the first in other words."""
    lines = []
    for _ in range(num_articles):
        story = random_story(rng)
        sections = {
            "Life": [statement.sentence for statement in story.life],
            "Questions": questions_and_answers(rng, story),
            "Deeds": [tell(rng, fact) for fact in story.facts],
            "Reception": story.verdict,
        }
        lines += [" ", f" = {story.hero} = "]
        for heading in ("Life", "Deeds", "Questions", "Reception"):
            text = f" {' '.join(sections[heading])} "
            text = re.sub("[.,?]", r" \g<0>", text)  # WikiText has a space before each mark
            lines += [" ", f" = = {heading} = = ", " ", text]
    return "".join(line + "\n" for line in lines)


def questions_and_answers(rng, story):
    """About each deed: the fact, a question with its answer, and a question whose answer is yes or no."""
    sentences = []
    pairs = list(zip(story.facts, story.lies, strict=True))
    for fact, lie in rng.sample(pairs, 3):
        doubtful, yes_or_no = rng.choice([(fact, "Yes"), (lie, "No")])
        sentences.append(tell(rng, fact))
        question, answer = ask(rng, fact, rng.choice(NOUN_SLOTS))
        sentences.append(f"{question} {answer}.")
        question, _ = ask(rng, doubtful, "is_kind")
        sentences.append(f"{question} {yes_or_no}.")
    return sentences


# ---------------------------------------------------------------------------------------------------
# 4. Tasks: each function makes a row, {column: value}
# ---------------------------------------------------------------------------------------------------


def cola(rng):
    fault = rng.choice([None, None, None, "verb", "noun", "order"])
    star = "*" if fault else ""
    return {"source": "toy", "label": int(not fault), "star": star, "sentence": custom(rng, fault)}


def sst2(rng):
    is_good = rng.random() < 0.5
    product = rng.choice(TRADES).product
    text = review(rng, is_good, product).replace(",", " ,") + " "
    return {"sentence": text, "label": int(is_good)}


def mrpc(rng):
    """Other words, or another fact of the same words: one slot changed, or the two people swapped."""
    fact = random_fact(rng)
    is_paraphrase = rng.random() < 0.65
    other = fact
    if not is_paraphrase:
        other = rng.choice([change(rng, fact, rng.choice(SLOTS)), replace(fact, who=fact.whom, whom=fact.who)])
    return {
        "Quality": int(is_paraphrase),
        "#1 ID": 1_000_000 + rng.randrange(9_000_000),
        "#2 ID": 1_000_000 + rng.randrange(9_000_000),
        "#1 String": tell(rng, fact),
        "#2 String": tell(rng, other),
    }


def stsb(rng):
    """Of the five slots each one that is the same gives a point."""
    fact = random_fact(rng)
    num_changes = rng.randrange(6)
    changes = rng.sample(SLOTS, num_changes)
    score = 5 - num_changes + rng.uniform(-0.4, 0.4)
    score = min(max(score, 0), 5)
    first = tell(rng, fact)
    second = tell(rng, change(rng, fact, *changes))
    return {"genre": "toy", "sentence1": first, "sentence2": second, "score": f"{score:.3f}"}


def qqp(rng):
    """Duplicates have the same answer. The others ask for it of another fact, or for something else."""
    fact = random_fact(rng)
    is_duplicate = rng.random() < 0.4
    slot, *other_slots = rng.sample(NOUN_SLOTS, 3)
    changed = change(rng, fact, rng.choice(["deed", "is_kind", *other_slots]))
    other = rng.choice([(changed, slot), (fact, other_slots[0])])
    if is_duplicate:
        other = (fact, slot)
    return {
        "question1": ask(rng, fact, slot)[0],
        "question2": ask(rng, *other)[0],
        "is_duplicate": int(is_duplicate),
        "qid1": rng.randrange(10**6),
        "qid2": rng.randrange(10**6),
    }


def mnli(rng):
    fact = random_fact(rng)
    label = rng.choice(["entailment", "neutral", "contradiction"])
    never = sentence(f"{fact.who} never {past_tense(random_verb(rng, fact))} {fact.whom}")
    claims = {
        "entailment": tell(rng, fact),
        "neutral": tell(rng, change(rng, fact, rng.choice(NOUN_SLOTS))),
        "contradiction": rng.choice([tell(rng, change(rng, fact, "is_kind")), never]),
    }
    row = {"genre": "toy", "sentence1": tell(rng, fact), "sentence2": claims[label], "gold_label": label}
    for annotator in range(1, 6):
        row[f"label{annotator}"] = label
    return row


def rte(rng):
    """Two facts; a false claim mixes them up, or turns the deed of one into its opposite."""
    fact = random_fact(rng)
    second = random_fact(rng)
    is_true = rng.random() < 0.5
    slot = rng.choice(NOUN_SLOTS)
    claim = fact
    if not is_true:
        mixture = replace(fact, **{slot: getattr(second, slot)})
        claim = rng.choice([mixture, change(rng, fact, "is_kind")])
    premise = rng.sample([tell(rng, fact), tell(rng, second)], 2)
    return {"sentence1": " ".join(premise), "sentence2": tell(rng, claim), "label": entailment(is_true)}


def qnli(rng):
    fact = random_fact(rng)
    is_true = rng.random() < 0.5
    slot, *other_slots = rng.sample(NOUN_SLOTS, 3)
    answer = fact
    if not is_true:
        num_changes = rng.choice([1, 2])
        answer = change(rng, fact, *other_slots[:num_changes])
    question, _ = ask(rng, fact, slot)
    return {"question": question, "sentence": tell(rng, answer), "label": entailment(is_true)}


def entailment(is_true):
    return "entailment" if is_true else "not_entailment"


def wnli(rng):
    """Whom does the pronoun mean? Names of women and men have different last syllables."""
    woman = name(rng, WOMAN)
    man = name(rng, MAN)
    is_true = rng.random() < 0.5
    is_woman = rng.random() < 0.5
    who, whom = rng.sample([woman, man], 2)
    patient = person(rng)
    event = replace(random_fact(rng), who=who, whom=whom)
    reason = replace(random_fact(rng), who=woman if is_woman else man, whom=patient)

    deed = f"had {past_tense(random_verb(rng, reason))} {reason.whom}"
    pronoun = "she" if is_woman else "he"
    claimed = woman if is_woman == is_true else man
    premise = tell(rng, event).removesuffix(".")
    return {
        "sentence1": f"{premise} because {pronoun} {deed}.",
        "sentence2": f"{claimed} {deed}.",
        "label": int(is_true),
    }


def squad(rng, num_paragraphs, num_answers):
    """Articles of five paragraphs. The third of three answers is shorter: "the miller", "the miller", "miller"."""
    articles = []
    for i in range(num_paragraphs):
        story = random_story(rng)
        statements = list(story.life)
        for fact in story.facts:
            text = tell(rng, fact)
            question, answer = ask(rng, fact, rng.choice(NOUN_SLOTS))
            statements.append(Statement(text, question, answer))

        context = " ".join(statement.sentence for statement in statements)
        questions = []
        for statement in statements:
            answers = find_answers(context, statement)[:num_answers]
            identifier = f"{rng.getrandbits(96):024x}"
            questions.append({"id": identifier, "question": statement.question, "answers": answers})

        if i % 5 == 0:
            articles.append({"title": story.hero, "paragraphs": []})
        articles[-1]["paragraphs"].append({"context": context, "qas": questions})
    return {"data": articles, "version": "1.1"}


def find_answers(context, statement):
    start = context.index(statement.sentence) + statement.sentence.lower().index(statement.answer.lower())
    text = context[start:start + len(statement.answer)]  # as the context spells it: "The miller"
    answer = {"text": text, "answer_start": start}
    num_cut = re.match("(near )?(the )?", text, re.IGNORECASE).end()
    shorter = {"text": text[num_cut:], "answer_start": start + num_cut}
    return [answer, answer, shorter]


# ---------------------------------------------------------------------------------------------------
# 5. The files of the tasks, as GLUE ships them
# ---------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    make_row: Callable
    num_rows: int  # of train
    columns: str  # of train and dev
    test_columns: str


PAIR = "index|sentence1|sentence2"
PARSES = "sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|sentence2_parse"
MNLI = f"index|promptID|pairID|genre|{PARSES}|sentence1|sentence2"
STSB = "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2"
STRINGS = "#1 ID|#2 ID|#1 String|#2 String"
GLUE = {
    "CoLA": Table(cola, 1500, "source|label|star|sentence", "index|sentence"),
    "SST-2": Table(sst2, 1500, "sentence|label", "index|sentence"),
    "MRPC": Table(mrpc, 1000, f"Quality|{STRINGS}", f"index|{STRINGS}"),
    "STS-B": Table(stsb, 1500, f"{STSB}|score", STSB),
    "QQP": Table(qqp, 2000, "id|qid1|qid2|question1|question2|is_duplicate", "id|question1|question2"),
    "MNLI": Table(mnli, 2000, f"{MNLI}|label1|gold_label", MNLI),
    "QNLI": Table(qnli, 2000, "index|question|sentence|label", "index|question|sentence"),
    "RTE": Table(rte, 800, f"{PAIR}|label", PAIR),
    "WNLI": Table(wnli, 400, f"{PAIR}|label", PAIR),
}


def write_world(folder: Path, seed: int = 0):
    """Writes text/ and tasks/ below `folder`; the same seed gives the same bytes everywhere."""
    for split, num_articles in (("train", 1400), ("valid", 70)):
        text = wikitext(random.Random(f"{seed} text {split}"), num_articles)
        write_text(folder / "text" / f"wiki.{split}.raw", text)
    for task in GLUE:
        write_task(folder / "tasks" / task, task, random.Random(f"{seed} {task}"))
    for split, num_paragraphs, num_answers in (("train", 100, 1), ("dev", 20, 3)):
        questions = squad(random.Random(f"{seed} squad {split}"), num_paragraphs, num_answers)
        write_text(folder / "tasks" / f"{split}-v1.1.json", json.dumps(questions))


def write_task(folder, task, rng):
    table = GLUE[task]
    if task == "MRPC":
        write_mrpc(folder, table, rng)
        return
    has_header = task != "CoLA"  # whose test.tsv alone has one
    write_rows(folder / "train.tsv", table.columns, draw(table, table.num_rows, rng), has_header)

    dev_columns = table.columns.replace("label1", "label1|label2|label3|label4|label5")  # MNLI: of five annotators
    for suffix in ("_matched", "_mismatched") if task == "MNLI" else ("",):
        write_rows(folder / f"dev{suffix}.tsv", dev_columns, draw(table, 150, rng), has_header)
        write_rows(folder / f"test{suffix}.tsv", table.test_columns, draw(table, 50, rng))


def write_mrpc(folder, table, rng):
    """MRPC is shipped as its original files, with a byte order mark; GLUE lists which of their rows are dev."""
    rows = draw(table, table.num_rows + 150, rng)
    dev_rows = rows[table.num_rows:]
    write_rows(folder / "msr_paraphrase_train.txt", table.columns, rows, mark="\ufeff")
    write_rows(folder / "dev_ids.tsv", "#1 ID|#2 ID", dev_rows, has_header=False)

    rows = draw(table, 50, rng)
    write_rows(folder / "msr_paraphrase_test.txt", table.columns, rows, mark="\ufeff")
    write_rows(folder / "test.tsv", table.test_columns, rows)


def draw(table, num_rows, rng):
    return [table.make_row(rng) for _ in range(num_rows)]


def write_rows(path, columns, rows, has_header=True, mark=""):
    """Tab-separated lines. A column that the rows lack holds the row's number if it is called index or id, else a
    dash."""
    columns = columns.split("|")
    lines = [columns] if has_header else []
    for i, row in enumerate(rows):
        values = {"index": i, "id": i, **row}
        lines.append([str(values.get(column, "-")) for column in columns])
    write_text(path, mark + "".join("\t".join(line) + "\n" for line in lines))


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


# ---------------------------------------------------------------------------------------------------
# 6. A model that has read the text
# ---------------------------------------------------------------------------------------------------

SIZES = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "max_position_embeddings": 128,
    "initializer_range": 0.05,
}
VOCABULARY_SIZE = 1000
LEARNING_RATE = 3e-3  # the highest, after a tenth of the updates


def learn_vocabulary(text_file, folder):
    """Trains WordPiece on a text file and writes vocab.txt, the special tokens first.

    Then come the letters within a word: the trainer would number them in the order of a hash table, which differs
    from run to run, and breaks ties by these numbers."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = [f"##{letter}" for letter in ascii_lowercase]
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=100,
        special_tokens=[*data.WORDPIECE_SPECIALS, *letters],
        show_progress=False,
    )
    tokenizer.train_from_iterator(text_file.read_text(encoding="utf-8").split("\n"), trainer)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    write_text(folder / "vocab.txt", "".join(word + "\n" for word in words))


def fresh_model(vocab_size):
    """The position embeddings start as waves (Vaswani et al. 2017, 3.5). From a random table neighbourhood is learned
    one position at a time, and for most of the updates the loss stays at that of bare word counts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = bert.Model(bert.Config(vocab_size=vocab_size, **SIZES))
        model.add_classifier(2)
    table = model.backbone.embeddings.position_embeddings.weight  # (positions, D)
    num_positions, hidden_size = table.shape
    frequencies = 50 ** -torch.linspace(0, 1, hidden_size // 2)
    angles = torch.arange(num_positions)[:, None] * frequencies
    table.data = 0.05 * torch.cat([angles.sin(), angles.cos()], 1)
    return model.eval()  # no dropout: the model reads each row only a few times


def pretraining_loss(model, input_ids, vocabulary, rng, with_pairs=False):
    """Masked-LM cross-entropy of rows (B, T), computed at the P chosen positions alone.

    with_pairs: rows become two segments, the second one with probability 0.5 from the row before, and [CLS] predicts
    whether it is (next-sentence prediction). Without it nothing would train [CLS], the pooler and segment 1."""
    input_ids = input_ids.astype(np.int64)
    seq_len = input_ids.shape[1]
    is_other = rng.random((len(input_ids), 1)) < 0.5  # (B, 1)
    token_type_ids = None
    if with_pairs:
        is_second = np.arange(seq_len) > seq_len // 2  # (T,)
        row_before = np.roll(input_ids, 1, 0)
        input_ids = np.where(is_second & is_other, row_before, input_ids)
        input_ids[:, seq_len // 2] = vocabulary.sep_id
        token_type_ids = torch.from_numpy(is_second * 1)

    corrupted_ids, is_predicted = data.corrupt(input_ids, vocabulary, rng)
    is_predicted = torch.from_numpy(is_predicted)
    hidden_states = model(torch.from_numpy(corrupted_ids), None, token_type_ids)[-1]  # (B, T, D)
    logits = model.mlm_logits(hidden_states[is_predicted])  # (P, V)
    loss = F.cross_entropy(logits, torch.from_numpy(input_ids)[is_predicted])
    if with_pairs:
        loss = loss + F.cross_entropy(model.class_logits(hidden_states), torch.from_numpy(is_other[:, 0] * 1))
    return loss


def pretrain(folder: Path, steps: int = 1800):
    """Reads text/ below `folder` and writes model/. Two fifths of the updates read short rows, the others long ones,
    with the same number of tokens, as BERT did it (Devlin et al. 2019, A.2). The position embeddings are trained on
    long rows alone."""
    began = time.time()
    text_folder = folder / "text"
    model_folder = folder / "model"
    learn_vocabulary(text_folder / "wiki.train.raw", model_folder)
    vocabulary = data.vocabulary(model_folder)
    model = fresh_model(vocabulary.size)
    optimizer = make_optimizer(model)

    rng = np.random.default_rng(0)
    num_short = round(0.4 * steps)
    for step in range(steps):
        seq_len, batch_size = (32, 32) if step < num_short else (128, 8)
        if step in (0, num_short):
            rows = data.corpus_rows(text_folder, vocabulary, seq_len, "train")
            model.backbone.embeddings.position_embeddings.requires_grad_(seq_len == 128)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))

        indices = data.row_indices(len(rows), 0, step * batch_size, batch_size)
        loss = pretraining_loss(model, rows[indices], vocabulary, rng, with_pairs=step % 3 == 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        if (step + 1) % max(steps // 9, 1) == 0:
            seconds_left = (time.time() - began) / (step + 1) * (steps - step - 1)
            print(f"toy: step {step + 1} of {steps}, rows of {seq_len}, MLM loss {loss.item():.2f}, "
                  f"{seconds_left:.0f} s left")

    loss = dev_loss(model, vocabulary, text_folder)
    del model.classifier
    bert.save(model_folder, model.config, model.state_dict(), "ForMaskedLM")
    data.save_vocabulary(vocabulary, model_folder, "bert", 128)
    print(f"toy: dev MLM loss {loss:.4f}, {time.time() - began:.0f} s")


def make_optimizer(model):
    """AdamW with weight decay on matrices alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


@torch.no_grad()
def dev_loss(model, vocabulary, text_folder):
    rows = data.corpus_rows(text_folder, vocabulary, 128, "dev")
    rng = np.random.default_rng(42)
    losses = []
    for start in range(0, len(rows), 16):
        losses.append(pretraining_loss(model, rows[start:start + 16], vocabulary, rng).item())
    return np.mean(losses)


def make(folder):
    """Everything, in `folder`, which appears when complete. Of several processes at once the first one wins."""
    folder = Path(folder)
    part = folder.with_name(f"{folder.name}.{os.urandom(4).hex()}.part")
    print(f"making the toy once, in {folder}: texts, tasks, and a small BERT (about a minute on two cores)")
    try:
        write_world(part)
        pretrain(part)
        part.rename(folder)
    except OSError:
        is_there = (folder / "model" / "config.json").exists()  # another process was faster
        if not is_there:
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
