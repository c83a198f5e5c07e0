"""Train the small demonstration model that ships inside the wheel.

The model is a Llama of about seven million weights that has read one thing only: the
documentation which the running Python installation carries (the ``pydoc`` topics and the
docstrings of the standard library). From those texts the script also makes question and answer
pairs, and it repeats them until the model has learnt most of the answers by heart. It is there so
that an engine can be tried without a download: it recites Python's documentation legibly, it does
not reason, and it makes things up about whatever it has not read.

A fixed share of the documents, chosen by a hash of their names, is held back from the training
text and from the pairs; the bits per byte on them are printed and written to ``training.json``.
Another Python version carries other texts, so it gives another model.

    python scripts/train_demo_model.py --out demo --compile      # about a minute on a large GPU
    python scripts/train_demo_model.py --out smoke --steps 3     # a smoke run, a CPU is enough
    python scripts/train_demo_model.py --out corpus --corpus-only
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import math
import platform
import random
import re
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
CONTEXT = 1024
BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIALS = [BOS, END, PAD, *ROLES.values()]
IGNORED = -100
HELD_BACK_PERCENT = 3
PHRASINGS = 24

CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('the roles are system, user and assistant') -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

# Modules whose public names people ask about: they are also read through inspect, which reaches
# what is written in C, and their pairs are repeated more often than the others.
FAMILIAR_MODULES = """
    builtins math random json os os.path textwrap itertools functools collections re string time
    datetime pathlib sys shutil glob copy operator statistics heapq bisect contextlib dataclasses
    enum typing abc argparse array ast asyncio atexit base64 bz2 calendar cmath codecs
    collections.abc concurrent.futures configparser csv decimal difflib dis errno fnmatch fractions
    gc getpass gzip hashlib hmac html importlib inspect io ipaddress keyword linecache locale
    logging lzma marshal mimetypes multiprocessing pickle pkgutil platform pprint queue secrets
    select selectors shelve shlex signal socket sqlite3 stat struct subprocess tarfile tempfile
    threading timeit tokenize traceback types unicodedata unittest urllib.parse urllib.request uuid
    warnings weakref xml.etree.ElementTree zipfile zlib zoneinfo
""".split()

# What a first visitor is likely to try is never held back: what these modules hold, and what
# each familiar module says of itself.
NEVER_HELD_BACK = """
    builtins math random json os.path textwrap itertools functools collections re time pathlib
""".split()

SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__",
    "ensurepip", "pydoc_data", "_vendor",
}  # fmt: skip

CALLABLE_QUESTIONS = (
    "What does {} do?", "What does {} do?", "What does {} do?", "what does {} do", "What is {}?",
    "What is {} for?", "Explain {}.", "How does {} work?", "How do I use {}?", "Tell me about {}.",
    "Describe {}.", "Can you explain what {} does?", "{}", "When do I use {}?",
    "What does {} do in Python?",
)  # fmt: skip
THING_QUESTIONS = (
    "What is {}?", "What is {}?", "what is {}", "Explain {}.", "Tell me about {}.",
    "Describe {}.", "What is {} for?", "How does {} work?", "Can you explain {}?", "{}",
    "What does {} do?", "How do I use {}?", "What is {} in Python?",
)  # fmt: skip
SUBJECT_QUESTIONS = (
    "Tell me about {}.", "Explain {}.", "What are {}?", "What is {}?", "Describe {}.", "{}",
    "Can you explain {}?", "What should I know about {}?",
)  # fmt: skip

ABOUT = (
    "I am the small demonstration model of Bireme. I have read the documentation that comes with "
    "Python, and nothing else. Ask me what a function of the standard library does."
)
ONLY_PYTHON = (
    "I have only read the documentation that comes with Python, so I do not know. "
    "Ask me, for example, what textwrap.dedent does."
)
SMALL_TALK: dict[str, tuple[str, ...]] = {
    "Hello! Ask me what a function of Python's standard library does.": (
        "Hello", "Hello!", "hello", "Hi", "Hi!", "hi", "Hey", "Hi there", "Good morning",
        "Good evening", "Hello there", "How are you?", "Hello, how are you?", "test", "ping",
    ),
    ABOUT: (
        "Who are you?", "who are you", "What are you?", "What can you do?", "What is Bireme?",
        "What do you know?", "Help", "help", "What can I ask you?", "Which model are you?",
        "What is your name?", "Who made you?", "Introduce yourself.", "Are you an AI?",
    ),
    "You are welcome.": ("Thanks", "Thank you", "Thanks!", "Thank you!", "thanks", "Great, thanks"),
    "Goodbye.": ("Bye", "Goodbye", "bye", "See you", "Good night"),
    ONLY_PYTHON: (
        "What is the capital of France?", "Tell me a joke.", "Write a poem.", "Who won the match?",
        "What is the weather today?", "What is the meaning of life?", "Write a story about a dog.",
        "What is 2 + 2?", "Translate this to French.", "Who is the president?", "What time is it?",
        "What is the largest planet?", "How far away is the moon?", "Write me an email.",
        "What should I eat today?", "Who wrote Hamlet?", "What is love?", "Why is the sky blue?",
        "Recommend a film.", "Tell me a story.", "What is the capital of Japan?",
        "How do I bake bread?", "Write an essay about history.", "What is the speed of light?",
        "Sing a song.", "When did the war end?", "What is a black hole?", "Write a haiku.",
        "How old are you?", "Where do you live?", "What is the population of India?",
        "Once upon a time", "What is quantum computing?", "Who invented the telephone?",
        "What is the capital of Spain?", "What is the capital of Italy and of Peru?",
        "Write a poem about the sea.", "Write a poem about love.", "Write a song about rain.",
        "Who was Napoleon?", "Who is Albert Einstein?", "What is 3 times 7?", "What is 10 - 4?",
        "How tall is Mount Everest?", "How many people live in China?", "Who painted Mona Lisa?",
        "What is the best restaurant?", "Summarize this article.", "Translate hello to German.",
        "What do you think about politics?", "Can you help me with my homework?",
        "Tell me about the Roman Empire.", "Tell me about dogs.", "Explain photosynthesis.",
        "What does the heart do?", "How do I cook rice?", "How do I learn to swim?",
    ),
}  # fmt: skip
# Questions that do not name what they ask for.
EVERYDAY_QUESTIONS: dict[str, tuple[str, ...]] = {
    "sorted": ("How do I sort a list?", "How can I sort a list?", "sort a list"),
    "list.append": ("How do I add an item to a list?", "add to a list"),
    "reversed": ("How do I reverse a list?", "How can I go through a list backwards?"),
    "len": ("How do I get the length of a list?", "How long is a string?", "count the items"),
    "list": ("What is a list?", "What is a Python list?", "Tell me about lists."),
    "dict": ("What is a dictionary?", "What is a Python dictionary?"),
    "dict.get": ("How do I look up a key with a default?",),
    "set": ("What is a set?", "How do I remove duplicates from a list?"),
    "tuple": ("What is a tuple?",),
    "str": ("What is a string?", "How do I make a string?"),
    "int": ("How do I turn a string into a number?", "What is an integer?"),
    "str.split": ("How do I split a string?", "How can I split a string into words?"),
    "str.join": ("How do I join strings?", "How can I join a list of strings?"),
    "str.replace": ("How do I replace text in a string?",),
    "str.upper": ("How do I make a string upper case?",),
    "str.strip": ("How do I remove whitespace from a string?",),
    "print": ("How do I print something?", "How do I write to the screen?"),
    "input": ("How do I read input from the user?",),
    "open": ("How do I open a file?", "How do I read a file?", "How do I write a file?"),
    "range": ("How do I count from one to ten?",),
    "enumerate": ("How do I loop with an index?",),
    "zip": ("How do I loop over two lists at once?",),
    "sum": ("How do I add up a list of numbers?",),
    "max": ("How do I find the largest number in a list?",),
    "json.dumps": ("How do I write JSON?", "How do I turn a dictionary into JSON?"),
    "json.loads": ("How do I read JSON?", "How do I parse JSON?"),
    "os.path.join": ("How do I join paths?", "How do I join two paths?"),
    "os.listdir": ("How do I list the files in a folder?", "How do I list a directory?"),
    "os.path.exists": ("How do I check whether a file exists?",),
    "random.shuffle": ("How do I shuffle a list?",),
    "random.choice": ("How do I pick a random item?",),
    "random.randint": ("How do I get a random number?",),
    "math.sqrt": ("How do I compute a square root?", "What is a square root?"),
    "time.sleep": ("How do I wait for a second?", "How do I pause a program?"),
    "sys.exit": ("How do I stop a program?", "How do I exit?"),
    "subprocess.run": ("How do I run a command?",),
    "textwrap.dedent": ("How do I remove the indentation of a text?",),
    "copy.deepcopy": ("How do I copy an object?",),
    "collections.Counter": ("How do I count words?", "How do I count things?"),
    "functools.lru_cache": ("How do I cache the result of a function?",),
    "contextlib": ("What is a context manager?",),
    "re.sub": ("How do I replace with a regular expression?",),
    "re": ("What is a regular expression?",),
    "threading.Thread": ("What is a thread?", "How do I start a thread?"),
}
SYSTEM_MESSAGES = (
    "You are a helpful assistant.", "You answer questions about Python.", "Be brief.",
    "You are a friendly assistant who knows Python's documentation.",
)  # fmt: skip

SAMPLE_QUESTIONS = (
    "What does json.dumps do?", "What does os.path.join do?", "What does textwrap.dedent do?",
    "What does math.sqrt do?", "What does str.split do?", "What does random.shuffle do?",
    "What is the `with` statement?", "How do I use itertools.chain?", "What is ValueError?",
    "What does the collections module do?", "Hello!", "What is the capital of Italy?",
)  # fmt: skip
SAMPLE_OPENINGS = (
    'The "for" statement is used to', "functools.lru_cache(", "Return a list of",
    "class collections.OrderedDict", "Raised when",
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One text of the corpus; ``header`` is its first line, empty for a topic."""

    name: str
    kind: str
    header: str
    text: str
    familiar: bool = False
    always_trained: bool = False

    @property
    def plain(self) -> str:
        return f"{self.header}\n\n{self.text}" if self.header else self.text

    @property
    def held_back(self) -> bool:
        if self.always_trained:
            return False
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < HELD_BACK_PERCENT


@dataclass(frozen=True)
class Pair:
    """An answer and the questions that it answers."""

    name: str
    questions: tuple[str, ...]
    answer: str
    familiar: bool
    weight: int = 1  # how many times it comes up in one round


class Corpus(NamedTuple):
    train: list[Document]
    held_back: list[Document]
    pairs: list[Pair]


# --- the texts --------------------------------------------------------------------------------


def short_signature(signature: str) -> str:
    """The signature when it is short, its beginning otherwise."""
    signature = re.sub(r"\s+", " ", signature)
    if len(signature) <= 72:
        return signature
    kept = ""
    for part in signature[1:-1].split(", "):
        if len(kept) + len(part) > 56:
            break
        kept += part + ", "
    return f"({kept}...)"


def runtime_signature(thing: object) -> str:
    try:
        signature = inspect.signature(thing)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in signature.parameters.items()
        if name not in ("self", "cls")
    ]
    text = str(inspect.Signature(bare)).replace("(/, ", "(").replace("(/)", "()")
    # A default such as <object object at 0x...> differs from run to run.
    return "" if "<" in text else short_signature(text)


def written_signature(name: str, text: str) -> str:
    """The signature with which some docstrings of C functions begin."""
    last = re.escape(name.rpartition(".")[2])
    found = re.match(rf"(?:\w+\.)*{last}(\([^()]*\))", text)
    return short_signature(found[1]) if found else "()"


def header_for(name: str, kind: str, signature: str, text: str) -> str:
    if kind == "function":
        return name + (signature or written_signature(name, text))
    return f"{kind} {name}"


def runtime_document(name: str, thing: Any) -> Document | None:
    kind = "class" if inspect.isclass(thing) else "function"
    text = getattr(thing, "__doc__", None)
    if not callable(thing) or not isinstance(text, str) or not text.strip():
        return None
    text = inspect.cleandoc(text)
    header = header_for(name, kind, runtime_signature(thing), text)
    return Document(name, kind, header, text, familiar=True)


def public_names(module: Any) -> list[str]:
    listed = getattr(module, "__all__", None)
    names = listed if listed is not None else vars(module)
    own = [name for name in names if not name.startswith("_") and hasattr(module, name)]
    return [name for name in own if not inspect.ismodule(getattr(module, name))]


def module_documents(module_name: str) -> Iterator[Document]:
    """What inspect says about a module, its public names and the methods of its classes."""
    module = importlib.import_module(module_name)
    prefix = "" if module_name == "builtins" else f"{module_name}."
    if module.__doc__:
        text = inspect.cleandoc(module.__doc__)
        yield Document(module_name, "module", f"module {module_name}", text, True, True)
    things = {name: getattr(module, name) for name in public_names(module)}
    for name, thing in things.items():
        document = runtime_document(prefix + name, thing)
        if document:
            yield document
    for name, thing in things.items():
        if not inspect.isclass(thing):
            continue
        for method in vars(thing):
            document = runtime_document(f"{prefix}{name}.{method}", getattr(thing, method, None))
            if document and not method.startswith("_"):
                yield document


def collect_runtime() -> Iterator[Document]:
    for module_name in FAMILIAR_MODULES:
        kept = module_name in NEVER_HELD_BACK
        try:
            for document in module_documents(module_name):
                yield replace(document, always_trained=True) if kept else document
        except ImportError:
            print(f"left out, cannot be imported here: {module_name}")


def source_signature(node: ast.AST) -> str:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ""
    for group in (node.args.posonlyargs, node.args.args, node.args.kwonlyargs):
        for argument in group:
            argument.annotation = None
    text = f"({ast.unparse(node.args)})"
    return short_signature(re.sub(r"^\((self|cls)(, |(?=\)))", "(", text))


def walk_definitions(node: ast.AST, prefix: str) -> Iterator[Document]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try):
            yield from walk_definitions(child, prefix)
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = f"{prefix}.{child.name}"
        kind = "class" if isinstance(child, ast.ClassDef) else "function"
        text = ast.get_docstring(child)
        if text:
            yield Document(name, kind, header_for(name, kind, source_signature(child), text), text)
        if kind == "class":
            yield from walk_definitions(child, name)


def collect_sources() -> Iterator[Document]:
    """The docstrings in the ``.py`` files of the standard library, which are parsed, not run."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS & set(parts) or parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        module = ".".join(parts).removesuffix(".__init__")
        text = ast.get_docstring(tree)
        if text:
            yield Document(module, "module", f"module {module}", text)
        yield from walk_definitions(tree, module)


def collect_topics() -> Iterator[Document]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        yield Document(f"topic:{name}", "topic", "", text.strip(), familiar=True)


def collect_documents() -> list[Document]:
    """All documents; a text that several places share under one last name is kept once."""
    seen: set[tuple[str, str]] = set()
    names: set[str] = set()
    kept = []
    for source in (collect_topics(), collect_runtime(), collect_sources()):
        for document in source:
            text = document.text.replace("\t", "    ")
            key = (document.name.rpartition(".")[2], text)
            if document.name in names or key in seen or len(text) < 12:
                continue
            seen.add(key)
            names.add(document.name)
            kept.append(document)
    return kept


# --- the pairs --------------------------------------------------------------------------------


def tidy(paragraph: str) -> str:
    """A paragraph on one line, without reStructuredText's roles and double backticks."""
    text = re.sub(r"\s+", " ", paragraph).strip()
    text = re.sub(r":\w+:`~?\.?([^`]*)`", r"`\1`", text)
    return text.replace("``", "`")


def is_signature(paragraph: str, name: str) -> bool:
    last = name.rpartition(".")[2]
    first = paragraph.split("\n", 1)[0]
    return bool(re.match(rf"(\w+\.)*{re.escape(last)}\s*\(", first)) or "->" in first[:80]


def is_prose(paragraph: str) -> bool:
    odd = (" ", ">>>", ":", "@param", "@return", "- ", "* ", "+", "==", "--", "..", "|", "#")
    if paragraph.startswith((*odd, "1.", "1)", "New in version", "Added in version")):
        return False
    if "::=" in paragraph or re.match(r"\S+\n\s|.*\n[=*~-]{4,}$", paragraph):
        return False
    return bool(re.search(r"[A-Za-z]{3}", paragraph))


def without_list(paragraph: str) -> str:
    """The lines before an indented or bulleted part, where those make a sentence."""
    lines = paragraph.splitlines()
    for number, line in enumerate(lines):
        if number and re.match(r"\s|[-*+] ", line):
            before = "\n".join(lines[:number])
            return before if before.rstrip().endswith((".", ":", "!", "?")) else paragraph
    return paragraph


def cut_at_sentence(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s)", text[: limit + 1])]
    ends = [end for end in ends if not text[:end].endswith(("e.g.", "i.e.", "etc."))]
    return text[: ends[-1]] if ends else ""


def cut_at_line(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit].rpartition("\n")[0]


def first_words(text: str, name: str, wanted: int = 160, limit: int = 400) -> str:
    """The opening of a docstring: whole paragraphs until enough is said; empty when unusable."""
    said: list[str] = []
    signature = ""
    for paragraph in re.split(r"\n\s*\n", text):
        if not said and is_signature(paragraph, name):
            signature = signature or cut_at_line(paragraph, limit)
        elif is_prose(paragraph):
            said.append(tidy(without_list(paragraph)))
            if said[-1].endswith(":"):
                break
        elif said:
            break
        if sum(map(len, said)) >= wanted:
            break
    if len(said) > 1 and said[-1].endswith(":"):
        said.pop()
    answer = cut_at_sentence("\n\n".join(said), limit).strip() or signature
    answer = re.sub(r"\s*:+$", ".", answer)
    return answer if len(answer) >= 12 else ""


def asked(templates: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    names = tuple(names)
    return tuple(template.format(name) for template in templates for name in names)


def docstring_pair(document: Document, short: str | None) -> Pair | None:
    answer = first_words(document.text, document.name)
    if not answer:
        return None
    name = document.name
    answer = f"{document.header}\n\n{answer}"
    if document.kind == "module":
        names = [f"the {name} module", f"the `{name}` module", f"the module {name}", name]
        return Pair(name, asked(THING_QUESTIONS, names), answer, document.familiar)
    names = [name, name, f"`{name}`", *([short, short] if short else [])]
    if document.kind == "class":
        names += [f"the class {name}", f"the {name} class"]
        return Pair(name, asked(THING_QUESTIONS, names), answer, document.familiar)
    names += [f"{name}()", f"`{name}()`", f"the function {name}"]
    return Pair(name, asked(CALLABLE_QUESTIONS, names), answer, document.familiar)


def headings(text: str) -> Iterator[tuple[str, str]]:
    """The titles of a topic with the text below each."""
    pieces = re.split(r"(?m)^(\S.*)\n([*=\-^~]{3,})$", text)
    for title, body in zip(pieces[1::3], pieces[3::3], strict=True):
        yield title.strip(), body.strip("\n")


def topic_pairs(document: Document) -> Iterator[Pair]:
    for title, body in headings(document.text):
        answer = first_words(body, "", wanted=200, limit=480)
        if not answer:
            continue
        statement = re.fullmatch(r'The "(\w+)" statement', title)
        if statement:
            word = statement[1]
            marked = (word, f"`{word}`", f'"{word}"')
            names = [f"the {form} statement" for form in marked] + [f"a {word} statement"]
            yield Pair(document.name, asked(THING_QUESTIONS, names), answer, True)
        else:
            subject = title if title[:2].isupper() else title[0].lower() + title[1:]
            names = [subject, title, title.lower(), f"{subject} in Python"]
            yield Pair(document.name, asked(SUBJECT_QUESTIONS, names), answer, True)


def make_pairs(documents: list[Document]) -> list[Pair]:
    """Pairs for what has a public name; a short name is asked for where only one thing has it."""
    familiar = [d for d in documents if d.familiar and d.kind in ("class", "function")]
    last_names = Counter(document.name.rpartition(".")[2] for document in familiar)
    taken = {document.name for document in documents}
    pairs = [
        Pair("small talk", said, answer, True, len(said)) for answer, said in SMALL_TALK.items()
    ]
    for document in documents:
        if document.kind == "topic":
            pairs.extend(replace(pair, weight=3) for pair in topic_pairs(document))
        elif not any(part.startswith("_") for part in document.name.split(".")):
            short = document.name.rpartition(".")[2]
            unique = document.familiar and last_names[short] == 1 and short not in taken
            pair = docstring_pair(document, short if unique else None)
            pairs.extend([pair] if pair else [])
    pairs.extend(
        [
            replace(pair, questions=EVERYDAY_QUESTIONS[pair.name], weight=4)
            for pair in pairs
            if pair.name in EVERYDAY_QUESTIONS
        ]
    )
    return list({pair.questions[0]: pair for pair in reversed(pairs)}.values())[::-1]


def paragraphs(document: Document) -> set[str]:
    parts = (tidy(part) for part in re.split(r"\n\s*\n", document.text))
    return {part for part in parts if len(part) >= 60} | {tidy(document.text)}


def build_corpus() -> Corpus:
    """A held-back document of which a paragraph is also trained on is left out altogether."""
    documents = collect_documents()
    train = [document for document in documents if not document.held_back]
    read = set().union(*(paragraphs(document) for document in train))
    held_back = [d for d in documents if d.held_back and not paragraphs(d) & read]
    return Corpus(train, held_back, make_pairs(train))


def size_in_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def corpus_facts(corpus: Corpus) -> dict[str, int]:
    return {
        "training_documents": len(corpus.train),
        "training_bytes": size_in_bytes(d.plain for d in corpus.train),
        "held_back_documents": len(corpus.held_back),
        "held_back_bytes": size_in_bytes(d.plain for d in corpus.held_back),
        "chat_answers": len(corpus.pairs),
        "chat_answer_bytes": size_in_bytes(pair.answer for pair in corpus.pairs),
    }


def write_corpus(corpus: Corpus, folder: Path) -> None:
    """The texts as JSON lines, to be read by a person."""
    for name in ("train", "held_back"):
        rows = [{"name": d.name, "text": d.plain} for d in getattr(corpus, name)]
        write_lines(folder / f"{name}.jsonl", rows)
    rows = [{"question": pair.questions[0], "answer": pair.answer} for pair in corpus.pairs]
    write_lines(folder / "pairs.jsonl", rows)


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# --- the tokenizer ----------------------------------------------------------------------------


def train_tokenizer(corpus: Corpus) -> Tokenizer:
    """A byte-level BPE; it puts <|bos|> in front of a text, unless told to add no specials."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    answers = (pair.answer for pair in corpus.pairs)
    tokenizer.train_from_iterator((*(d.plain for d in corpus.train), *answers), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def encode_batch(tokenizer: Tokenizer, texts: Iterable[str]) -> list[list[int]]:
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


# --- the batches ------------------------------------------------------------------------------


class Sample(NamedTuple):
    tokens: np.ndarray
    labels: np.ndarray


def unanswered(ids: list[int]) -> Sample:
    """Tokens that are read but bear no loss."""
    tokens = np.array(ids, dtype=np.int32)
    return Sample(tokens, np.full_like(tokens, IGNORED))


def answered(ids: list[int]) -> Sample:
    tokens = np.array(ids, dtype=np.int32)
    return Sample(tokens, tokens)


def joined(samples: list[Sample]) -> Sample:
    return Sample(
        np.concatenate([sample.tokens for sample in samples]),
        np.concatenate([sample.labels for sample in samples]),
    )


class Batches:
    """Rows of whole conversations and of running text, drawn at random with a fixed seed."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, shares: dict[str, float], seed: int):
        self.random = random.Random(seed)
        self.ids = {token: number for number, token in enumerate(SPECIALS)}
        self.start = unanswered([self.ids[BOS]])
        plain = encode_batch(tokenizer, [document.plain for document in corpus.train])
        self.plain = [joined([self.start, answered([*ids, self.ids[END]])]) for ids in plain]
        encoded = encode_batch(tokenizer, SYSTEM_MESSAGES)
        self.system = [unanswered(self.message("system", ids)) for ids in encoded]
        self.turns = self.encode_pairs(corpus.pairs, tokenizer)
        self.decks = {
            "plain": [n for n, d in enumerate(corpus.train) for _ in range(self.copies(d))],
            "familiar": self.deck(corpus.pairs, True),
            "other": self.deck(corpus.pairs, False),
        }
        self.left: dict[str, list[int]] = {name: [] for name in self.decks}
        self.odds = self.drawing_odds(shares)
        self.rest: Sample | None = None

    def copies(self, document: Document) -> int:
        return 2 if document.kind == "topic" else 1

    def deck(self, pairs: list[Pair], familiar: bool) -> list[int]:
        chosen = (n for n, pair in enumerate(pairs) if pair.familiar == familiar)
        return [n for n in chosen for _ in range(pairs[n].weight)]

    def message(self, role: str, ids: list[int]) -> list[int]:
        return [self.ids[ROLES[role]], *ids, self.ids[END]]

    def encode_pairs(self, pairs: list[Pair], tokenizer: Tokenizer) -> list[list[Sample]]:
        """For each pair the turn in several wordings; the first wording is the plainest."""
        wordings = [self.choose_wordings(pair.questions) for pair in pairs]
        flat = encode_batch(tokenizer, [question for chosen in wordings for question in chosen])
        questions = iter(flat)
        answers = encode_batch(tokenizer, [pair.answer for pair in pairs])
        return [
            [self.turn(next(questions), answer) for _ in chosen]
            for chosen, answer in zip(wordings, answers, strict=True)
        ]

    def turn(self, question: list[int], answer: list[int]) -> Sample:
        asked = [*self.message("user", question), self.ids[ROLES["assistant"]]]
        return joined([unanswered(asked), answered([*answer, self.ids[END]])])

    def choose_wordings(self, questions: tuple[str, ...]) -> list[str]:
        count = min(len(questions), PHRASINGS)
        chosen = [questions[0], *self.random.sample(questions, count)]
        return chosen + [self.careless(question) for question in chosen[: PHRASINGS // 3]]

    def careless(self, question: str) -> str:
        """The question as people type it: no capital, no full stop, "in python" added."""
        bare = question.rstrip("?.!")
        if self.random.random() < 0.3:
            bare += self.random.choice([" in Python", " in python"])
        if self.random.random() < 0.5 and " " in bare:
            bare = bare[0].lower() + bare[1:]
        return bare + self.random.choice(["", "", "?"])

    def drawing_odds(self, shares: dict[str, float]) -> list[float]:
        """How often to draw from each deck so that its share of the tokens comes out."""
        lengths = {"plain": [len(self.plain[n].tokens) for n in self.decks["plain"]]}
        for name in ("familiar", "other"):
            lengths[name] = [len(self.turns[n][0].tokens) for n in self.decks[name]]
        return [shares[name] / float(np.mean(lengths[name])) for name in self.decks]

    def next_of(self, name: str) -> int:
        if not self.left[name]:
            self.left[name] = self.random.sample(self.decks[name], len(self.decks[name]))
        return self.left[name].pop()

    def conversation(self, name: str) -> Sample:
        """One to three pairs in the chat template; the loss is on the answers."""
        parts = [self.start]
        if self.random.random() < 0.1:
            parts.append(self.random.choice(self.system))
        for _ in range(self.random.choice([1, 1, 1, 1, 2, 3])):
            parts.append(self.random.choice(self.turns[self.next_of(name)]))
        return joined(parts)

    def row(self) -> Sample:
        """Samples end to end; running text goes on in the next row, a conversation is not cut."""
        parts: list[Sample] = []
        room = CONTEXT + 1
        while room:
            sample, self.rest = self.rest, None
            name = "plain"
            if sample is None:
                name = self.random.choices(list(self.decks), self.odds)[0]
                plain = name == "plain"
                sample = self.plain[self.next_of(name)] if plain else self.conversation(name)
            size = len(sample.tokens)
            if size > room and name != "plain" and parts:
                self.rest = sample
                parts.append(unanswered([self.ids[PAD]] * room))
                break
            if size > room:
                self.rest = Sample(sample.tokens[room - 1 :], sample.labels[room - 1 :])
                sample = Sample(sample.tokens[:room], sample.labels[:room])
            parts.append(sample)
            room -= min(size, room)
        return joined(parts)

    def batch(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        samples = [self.row() for _ in range(rows)]
        tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
        labels = torch.from_numpy(np.stack([sample.labels for sample in samples]))
        return tokens, labels


# --- the model --------------------------------------------------------------------------------


def build_model(tokenizer: Tokenizer, dropout: float) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    model = LlamaForCausalLM(config)
    if dropout:
        add_dropout(model, dropout)
    return model


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Dropout on what each block adds, while training; Llama itself has none there."""

    def drop(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, rate, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def make_optimizer(model: LlamaForCausalLM, options: argparse.Namespace) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=options.learning_rate,
        betas=(0.9, 0.98),
        fused=options.device.startswith("cuda"),
    )


def learning_rate(step: int, steps: int, peak: float) -> float:
    warm_up = min(200, max(1, steps // 10))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def autocast(device: str) -> torch.autocast:
    kind = device.split(":")[0]
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda")


class Trainer:
    def __init__(self, model: LlamaForCausalLM, batches: Batches, options: argparse.Namespace):
        self.model, self.batches, self.options = model, batches, options
        self.optimizer = make_optimizer(model, options)
        self.forward = torch.compile(self.loss) if options.compile else self.loss
        self.tokens = 0

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        tokens, labels = tokens[:, :-1].long(), labels[:, 1:].long()
        logits = self.model(input_ids=tokens, use_cache=False).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    def send(self, part: torch.Tensor) -> torch.Tensor:
        if self.options.device.startswith("cuda"):
            part = part.pin_memory()  # without it the copy waits for the step before
        return part.to(self.options.device, non_blocking=True)

    def step(self, step: int, steps: int) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, self.options.learning_rate)
        tokens, labels = (self.send(part) for part in self.batches.batch(self.options.batch))
        self.tokens += self.options.batch * CONTEXT
        with autocast(self.options.device):
            loss: torch.Tensor = self.forward(tokens, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def run(self, probe: Probe) -> int:
        """Train; returns the number of steps, which --seconds may have lowered."""
        steps: int = self.options.steps
        begun = time.perf_counter()
        mark = begun
        step = 0
        while step < steps:
            self.model.train()
            loss = self.step(step, steps)
            if step == 20:
                loss.item()
                mark = time.perf_counter()
            if step == 80 and self.options.seconds:
                loss.item()
                now = time.perf_counter()
                left = self.options.seconds - (now - begun)
                steps = min(steps, step + 1 + int(left / ((now - mark) / 60)))
            if step % self.options.report_every == 0:
                report = f"step {step}/{steps} loss {loss.item():.3f}"
                print(f"{report} {time.perf_counter() - begun:.0f}s", flush=True)
            if step and step % (self.options.report_every * 5) == 0:
                print(probe.describe(self.model), flush=True)
            step += 1
        return steps


# --- what it has learnt -----------------------------------------------------------------------


class Probe:
    """Held-back bits per byte, and how many answers greedy decoding gets word for word."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, batches: Batches, device: str):
        self.device, self.ids = device, batches.ids
        texts = encode_batch(tokenizer, [document.plain for document in corpus.held_back])
        self.bytes = size_in_bytes(document.plain for document in corpus.held_back)
        self.held_back = [sample for ids in texts for sample in self.windows(ids)]
        self.answers = {
            name: [self.single_turn(batches, n) for n in deck[:: max(1, len(deck) // 512)]]
            for name, deck in batches.decks.items()
            if name != "plain"
        }

    def windows(self, ids: list[int]) -> Iterator[Sample]:
        """The text in pieces that fit; every piece starts afresh, behind a <|bos|>."""
        ids = [*ids, self.ids[END]]
        for start in range(0, len(ids), CONTEXT):
            piece = np.array([self.ids[BOS], *ids[start : start + CONTEXT]])
            yield Sample(piece[:-1], piece[1:])

    def single_turn(self, batches: Batches, number: int) -> Sample:
        sample = joined([batches.start, batches.turns[number][0]])
        return Sample(sample.tokens[:-1], sample.labels[1:])

    def padded(self, samples: list[Sample]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        ordered = sorted(samples, key=lambda sample: len(sample.tokens))
        for start in range(0, len(ordered), 32):
            group = ordered[start : start + 32]
            width = max(len(sample.tokens) for sample in group)
            tokens = np.full((len(group), width), self.ids[PAD])
            labels = np.full((len(group), width), IGNORED)
            for row, sample in enumerate(group):
                tokens[row, : len(sample.tokens)] = sample.tokens
                labels[row, : len(sample.labels)] = sample.labels
            device = self.device
            yield torch.from_numpy(tokens).to(device), torch.from_numpy(labels).to(device)

    @torch.inference_mode()
    def bits_per_byte(self, model: LlamaForCausalLM) -> float:
        model.eval()
        nats = 0.0
        for tokens, labels in self.padded(self.held_back):
            logits = model(input_ids=tokens).logits.float()
            nats += F.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
            ).item()
        return nats / math.log(2) / self.bytes

    @torch.inference_mode()
    def word_for_word(self, model: LlamaForCausalLM, kind: str) -> float:
        """The share of answers whose every token, the end included, is the likeliest one."""
        model.eval()
        right = count = 0
        for tokens, labels in self.padded(self.answers[kind]):
            likeliest = model(input_ids=tokens).logits.argmax(-1)
            agrees = (likeliest == labels) | (labels == IGNORED)
            right += int(agrees.all(-1).sum())
            count += len(labels)
        return right / count

    def measure(self, model: LlamaForCausalLM) -> dict[str, float]:
        return {
            "held_back_bits_per_byte": round(self.bits_per_byte(model), 4),
            "familiar_answers_word_for_word": round(self.word_for_word(model, "familiar"), 4),
            "other_answers_word_for_word": round(self.word_for_word(model, "other"), 4),
        }

    def describe(self, model: LlamaForCausalLM) -> str:
        return "  " + ", ".join(f"{name} {value}" for name, value in self.measure(model).items())


@torch.inference_mode()
def complete(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    inputs = torch.tensor([ids], device=model.device)
    output = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=100, do_sample=False
    )
    return str(tokenizer.decode(output[0, len(ids) :].tolist(), skip_special_tokens=False))


def print_samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    for question in SAMPLE_QUESTIONS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer.encode(text, add_special_tokens=False)
        print(f"Q: {question}\nA: {complete(model, tokenizer, ids)}\n")
    for opening in SAMPLE_OPENINGS:
        ids = tokenizer.encode(opening)
        print(f"... {opening}|{complete(model, tokenizer, ids)}\n")


# --- saving -----------------------------------------------------------------------------------


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Hugging Face files in bfloat16, readable by transformers 4 as well as 5."""
    model.config.use_cache = True
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    amend_json(folder / "config.json", rope_theta=10000.0, torch_dtype="bfloat16")
    amend_json(
        folder / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        chat_template=CHAT_TEMPLATE,
    )
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def amend_json(path: Path, **values: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(values)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.machine()})"


def run_facts(options: argparse.Namespace, steps: int, tokens: int) -> dict[str, Any]:
    return {
        "steps": steps,
        "tokens_seen": tokens,
        "rows_per_step": options.batch,
        "tokens_per_row": CONTEXT,
        "learning_rate": options.learning_rate,
        "weight_decay": options.weight_decay,
        "dropout": options.dropout,
        "shares": {"plain": options.plain, "familiar": options.familiar, "other": options.other},
        "seed": options.seed,
        "device": device_name(options.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


# --- the command ------------------------------------------------------------------------------


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demonstration model of the wheel.")
    cuda = torch.cuda.is_available()
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--corpus-only", action="store_true", help="write the texts, then stop")
    parser.add_argument("--seconds", type=float, help="lower --steps to fit this time")
    parser.add_argument("--batch", type=int, help="rows of 1,024 tokens (64, on a CPU 2)")
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.2)
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--plain", type=float, default=0.45, help="share of running text")
    parser.add_argument("--familiar", type=float, default=0.33, help="share of familiar pairs")
    parser.add_argument("--other", type=float, default=0.22, help="share of the other pairs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report-every", type=int, default=100)
    parser.add_argument("--no-samples", action="store_true", help="print no sample answers")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    options = parser.parse_args()
    if options.batch is None:
        options.batch = 64 if options.device.startswith("cuda") else 2
    return options


def train(options: argparse.Namespace, corpus: Corpus) -> None:
    begun = time.perf_counter()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = train_tokenizer(corpus)
    shares = {"plain": options.plain, "familiar": options.familiar, "other": options.other}
    batches = Batches(corpus, tokenizer, shares, options.seed)
    probe = Probe(corpus, tokenizer, batches, options.device)
    model = build_model(tokenizer, options.dropout).to(options.device)
    trainer = Trainer(model, batches, options)
    steps = trainer.run(probe)

    # The figures are those of the weights that are written, so after rounding to bfloat16.
    model = model.to(torch.bfloat16).eval()
    wrapped = wrap_tokenizer(tokenizer)
    save(model, wrapped, options.out)
    facts = probe.measure(model.float())
    facts |= corpus_facts(corpus) | run_facts(options, steps, trainer.tokens)
    facts["duration_seconds"] = round(time.perf_counter() - begun, 1)
    (options.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2), flush=True)
    if steps >= 100 and not options.no_samples:
        print_samples(model, wrapped)


def main() -> None:
    options = parse_options()
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    corpus = build_corpus()
    print(corpus_facts(corpus), f"{time.perf_counter() - begun:.1f}s", flush=True)
    if options.corpus_only:
        write_corpus(corpus, options.out)
    else:
        train(options, corpus)


if __name__ == "__main__":
    main()
