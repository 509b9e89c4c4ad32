"""Broken servers, hostile archives and full disks: what data.py does about them.

    python -m pytest dev/test_hostile_data.py
"""

import gzip
import hashlib
import http.server
import io
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

import bert
import data
import tamt
from test_tamt import mask_settings, tiny, write

ROOT = Path(__file__).resolve().parent.parent
BODY = bytes(range(256)) * 2000  # 512,000 bytes
SHA256 = hashlib.sha256(BODY).hexdigest()


def left(folder):
    """The files of a folder without the hidden ones, which are locks and remembered hashes."""
    return sorted(path.name for path in Path(folder).iterdir() if not path.name.startswith("."))


# ---------------------------------------------------------------- servers


def reply(status=200, body=b"", hang_up=False, **headers):
    """An answer with these headers (underscores are dashes, None leaves one out)."""
    def answer(handler):
        handler.send_response(status)
        for name, value in ({"Content_Length": len(body)} | headers).items():
            if value is not None:
                handler.send_header(name.replace("_", "-"), str(value))
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = hang_up
    return answer


def serve(body=BODY, end=None):
    """An honest answer that continues downloads; with `end` the connection breaks off at that byte."""
    def answer(handler):
        start = int(re.sub("[^0-9]", "", handler.headers.get("Range", "")) or 0)
        headers = {"Content_Length": len(body) - start}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        reply(206 if start else 200, body[start:end], end is not None, **headers)(handler)
    return answer


def stall(handler):
    reply(200, BODY[:1000], Content_Length=len(BODY))(handler)
    time.sleep(1)
    handler.close_connection = True


@pytest.fixture
def server(monkeypatch, tmp_path):
    """server.answers: {path: list of answers, one for each request, the last one for all that follow}."""
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        answers, num_requests = {}, 0

        def do_GET(self):
            type(self).num_requests += 1
            answers = self.answers[self.path]
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            answer(self)

        def log_message(self, *_):
            pass

    for name in list(os.environ):
        if re.search("(?i)^HF_|_OFFLINE|proxy", name):
            monkeypatch.delenv(name)
    monkeypatch.setattr(data, "PAUSES", (0.01, 0.01, 0))
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.3")
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.handle_error = lambda *_: None
    threading.Thread(target=http_server.serve_forever, args=(0.01,), daemon=True).start()
    Handler.url = f"http://127.0.0.1:{http_server.server_address[1]}"
    yield Handler
    http_server.shutdown()
    http_server.server_close()


OTHER_RANGE = reply(206, BODY, Content_Range="bytes 0-511999/512000")
RECOVERABLE = {
    "a range that nobody asked for, but right": [OTHER_RANGE],
    "two breaks": [serve(end=100_000), serve(end=300_000), serve()],
    "busy": [reply(503), reply(408), serve()],
    "too many requests": [reply(429), serve()],
    "starts again": [serve(end=100_000), reply(200, BODY)],
    "range refused": [serve(end=100_000), reply(416), serve()],
    "another range": [serve(end=100_000), OTHER_RANGE, serve()],
    "a range without its numbers": [serve(end=100_000), reply(206, BODY[100_000:]), serve()],
    "first a part of another file": [serve(b"x" * 512_000, end=100_000), serve(), serve()],
    "no length, breaks off": [reply(200, BODY[:70_000], True, Content_Length=None), serve()],
}


@pytest.mark.parametrize("case", RECOVERABLE)
def test_a_download_recovers(server, tmp_path, case):
    server.answers["/f"] = list(RECOVERABLE[case])
    assert data.fetch(server.url + "/f", tmp_path / "f", len(BODY), SHA256).read_bytes() == BODY
    assert left(tmp_path) == ["f"] and server.num_requests == len(RECOVERABLE[case])


WRONG = {  # words of the error: the answer
    "404": reply(404),
    "403": reply(403),
    "503": reply(503),
    "has hash": reply(200, BODY[::-1]),
    "offers 511999 bytes": reply(200, BODY[1:]),
    "offers 512001 bytes": reply(200, BODY + b"x"),
    "more than 512000": reply(200, BODY * 3, True, Content_Length=None),
    "sends gzip": reply(200, gzip.compress(BODY), Content_Encoding="gzip"),
    "many": reply(200, BODY, True, Content_Length="many"),
    "breaks off|range": reply(200, gzip.compress(BODY), True, Content_Length=None),
    "broken|IncompleteRead|breaks off|range": serve(end=99),
    "imed out|range": stall,
    "offers 7 bytes": reply(200, b"<html/>", Content_Type="text/html"),
    "redirects": reply(302, Location="/f"),
    "adapters": reply(302, Location="file:///etc/passwd"),
    "Connection|BadStatus": lambda handler: handler.wfile.write(b"SSH\r\n"),
}


@pytest.mark.parametrize("words", WRONG)
def test_nothing_wrong_gets_the_name_of_the_file(server, tmp_path, words):
    server.answers = {"/f": [WRONG[words]], "/good": [serve()]}
    urls = [server.url + "/f", "http://127.0.0.1:9/nobody"]
    with pytest.raises(OSError) as caught:
        data.fetch(urls, tmp_path / "f", len(BODY), SHA256)
    message = str(caught.value)
    assert re.search(words, message) and "\n" not in message
    assert all(f"{url}: " in message for url in urls)
    assert not (tmp_path / "f").exists()

    data.fetch([urls[0], server.url + "/good"], tmp_path / "f", len(BODY), SHA256)
    assert (tmp_path / "f").read_bytes() == BODY and left(tmp_path) == ["f"]


def test_without_a_hash_no_page_no_flood_and_nothing_pieced_together(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LARGEST", 600_000)
    page = reply(200, b"<>", Content_Type="text/html")
    flood = reply(200, BODY * 9, True, Content_Length=None)
    for answer in (page, flood):
        server.answers["/f"] = [answer]
        with pytest.raises(OSError, match="put the file at"):
            data.fetch(server.url + "/f", tmp_path / "f")
        assert left(tmp_path) == []

    (tmp_path / "f.part").write_bytes(b"of another file")
    server.answers["/f"] = [serve()]
    assert data.fetch(server.url + "/f", tmp_path / "f", len(BODY)).read_bytes() == BODY


def test_a_complete_part_is_taken_if_only_the_server_knows_its_hash(server, tmp_path):
    (tmp_path / "f.part").write_bytes(BODY)
    server.answers["/f"] = [reply(416, X_Linked_Etag=SHA256)]
    assert data.fetch(server.url + "/f", tmp_path / "f").read_bytes() == BODY


def test_a_disk_that_is_full_during_a_download_names_the_file(server, tmp_path):
    server.answers["/f"] = [serve()]
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import data
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
data.fetch({server.url + "/f"!r}, 'f', 512000, {SHA256!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert re.match("OSError: .*'f'", done.stderr.splitlines()[-1])
    assert not (tmp_path / "f").exists()


# ---------------------------------------------------------------- archives


def zip_file(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def tar_file(path, members):
    """members: (name, content) or (name, content, type, target of a link)."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content, *kind in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            if kind:
                header.type, header.linkname = kind
            archive.addfile(header, io.BytesIO(content))
    return path


def replaced(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def cut(path, num_bytes):
    path.write_bytes(path.read_bytes()[:-num_bytes])


HOSTILE = {  # case: what makes the archive
    "zip bomb": lambda path: zip_file(path, [("zeros", bytes(400_000_000))]),
    "tar bomb": lambda path: tar_file(path, [("zeros", bytes(400_000_000))]),
    "zip says less": lambda path: replaced(zip_file(path, [("a", b"x" * 1000)]), b"\xe8\3\0\0", b"\n\0\0\0"),
    "zip says 4 GB": lambda path: replaced(
        zip_file(path, [("a", b"x" * 1000)]), b"\xe8\3\0\0", b"\xf0\xff\xff\xff"),
    "zip file and folder": lambda path: zip_file(path, [("a", b"x"), ("a/b", b"y")]),
    "zip cut": lambda path: cut(zip_file(path, [("a", b"x" * 99)]), 30),
    "tar cut": lambda path: cut(tar_file(path, [("a", os.urandom(9999))]), 2000),
    "tar leads out": lambda path: tar_file(path, [("../../evil", b"x")]),
    "tar link out": lambda path: tar_file(path, [("link", b"", tarfile.SYMTYPE, "/etc/passwd")]),
    "tar hard link out": lambda path: tar_file(path, [("link", b"", tarfile.LNKTYPE, "../../evil")]),
    "tar device": lambda path: tar_file(path, [("device", b"", tarfile.CHRTYPE, "")]),
    "empty": lambda path: path.write_bytes(b""),
    "no archive": lambda path: path.write_bytes(b"hello"),
    "gzip of text": lambda path: path.write_bytes(gzip.compress(b"hello " * 999)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_refused_in_a_line_and_leaves_nothing(tmp_path, case):
    HOSTILE[case](tmp_path / "archive")
    (tmp_path / "home").mkdir()
    before = sorted(tmp_path.rglob("*"))
    begin = time.time()
    with pytest.raises((ValueError, OSError)) as caught:
        data.unpack(tmp_path / "archive", tmp_path / "home" / "out")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert time.time() - begin < 5


@pytest.mark.parametrize("make", [zip_file, tar_file])
@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/tamt_evil/x"])
def test_no_member_lands_outside_of_the_folder(tmp_path, make, name):
    make(tmp_path / "archive", [("ok", b""), (name, b"x")])
    (tmp_path / "home").mkdir()
    try:
        data.unpack(tmp_path / "archive", tmp_path / "home" / "out")
    except ValueError:
        pass  # tarfile refuses, zipfile keeps the member inside
    outside = [path for path in tmp_path.rglob("*") if tmp_path / "home" / "out" not in path.parents]
    assert sorted(path.name for path in outside if path.is_file()) == ["archive"]
    assert not Path("/tmp/tamt_evil").exists()


@pytest.mark.parametrize("make", [zip_file, tar_file])
def test_a_mutated_archive_unpacks_right_or_is_refused(tmp_path, make):
    members = {"top/a.txt": b"hello " * 50, "top/sub/b.bin": os.urandom(2000)}
    archive = make(tmp_path / "archive", members.items())
    original = archive.read_bytes()
    generator = random.Random(1)
    num_refused = 0
    for trial in range(150):
        content = bytearray(original)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        if trial > 100:
            del content[generator.randrange(len(content)):]
        archive.write_bytes(content)
        folder = tmp_path / f"out{trial}"
        try:
            data.unpack(archive, folder)
        except (ValueError, OSError) as error:
            num_refused += 1
            assert "\n" not in str(error) and not folder.exists()
            continue
        for path in folder.rglob("*.*"):  # a member may have lost its name, but not its content
            assert path.is_dir() or path.read_bytes() in (*members.values(), b"")
    assert num_refused > 50
    assert not list(tmp_path.glob("*.part"))


# ---------------------------------------------------------------- disks


def test_a_full_disk_keeps_the_old_file_and_the_lines_before(tmp_path):
    (tmp_path / "x").write_text("old")
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import bert, data
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with bert.atomic_write('x') as file:
        file.write(bytes(10**6))
except OSError as error:
    print(error)
try:
    for _ in range(200):
        data.append_line('log', {{'a': 'x' * 985}})
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    about_x, about_log = done.stdout.splitlines()
    assert "'x'" in about_x and "cannot write log" in about_log
    assert (tmp_path / "x").read_text() == "old" and left(tmp_path) == ["log", "x"]
    assert {len(line) for line in (tmp_path / "log").read_text().split("\n")} == {0, 994}


def test_a_write_that_is_interrupted_leaves_the_old_file(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(KeyboardInterrupt), bert.atomic_write(tmp_path / "x") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "x").read_text() == "old" and left(tmp_path) == ["x"]
    with pytest.raises(OSError, match="gone/x"), bert.atomic_write(tmp_path / "gone" / "x") as file:
        file.write(b"half")


def test_a_tar_with_a_link_to_nothing_is_damaged(tmp_path):
    link = tarfile.TarInfo("m/pytorch_model.bin")
    link.type = tarfile.LNKTYPE
    link.linkname = "m/nothere"
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.addfile(link)
    with pytest.raises(ValueError, match="cannot unpack"):
        data.unpack(tmp_path / "a.tar.gz", tmp_path / "folder")


def test_a_setting_that_is_a_text_is_not_taken_for_true(inputs, tmp_path):
    shutil.copytree(inputs / "bert", tmp_path / "bert")
    write(tmp_path / "bert/tokenizer_config.json", {"one_row_per_line": "false"})
    with pytest.raises(ValueError, match="one_row_per_line"):
        data.vocabulary(tmp_path / "bert")


def test_an_export_does_not_inherit_special_tokens(inputs, tmp_path):
    vocabulary = data.vocabulary(inputs / "bert")
    write(tmp_path / "x/special_tokens_map.json", {"additional_special_tokens": ["the"]})
    data.save_vocabulary(vocabulary, tmp_path / "x", "bert", max_tokens=48)
    assert data.vocabulary(tmp_path / "x").special_ids == vocabulary.special_ids


def test_a_text_is_not_cut_inside_a_token_that_ends_in_a_space(inputs, tmp_path):
    shutil.copytree(inputs / "bert", tmp_path / "bert")
    write(tmp_path / "bert/tokenizer_config.json", {"extra_special_tokens": ["<word> "]})
    vocabulary = data.vocabulary(tmp_path / "bert")
    assert not data.piece_pattern(vocabulary.tokenizer).search("<word> " * 3000)


def test_dropout_of_nearly_everything_keeps_nearly_nothing():
    for dropout_prob in (0.9999, 0.999995):
        assert bert.dropout_mask((4, 10000), dropout_prob).float().mean() < 0.001


def test_a_fresh_head_takes_the_word_embeddings_also_if_the_model_is_not_tied(inputs, tmp_path):
    model = bert.load(inputs / "bert")
    tensors = {name: tensor for name, tensor in model.named_parameters() if not name.startswith("cls.")}
    shutil.copytree(inputs / "bert", tmp_path / "bert")
    bert.save(tmp_path / "bert", model.config, tensors, "ForMaskedLM", tie_word_embeddings=False)
    settings = mask_settings(inputs, tmp_path / "run", model=str(tmp_path / "bert"))
    opened, _ = tamt.read_model(settings, tamt.Machine(torch.device("cpu")))
    assert opened.mlm_head.is_fresh and opened.mlm_head.decoder is None


def test_a_text_in_utf_16_is_refused(tmp_path):
    vocabulary = data.vocabulary(tiny(tmp_path / "roberta", "roberta"))
    (tmp_path / "text.txt").write_bytes(("the cat sees a dog .\n" * 100).encode("utf-16-le"))
    for split in ("train", "dev"):
        with pytest.raises(ValueError, match="more than a tenth of its bytes are 0"):
            data.corpus_rows(tmp_path / "text.txt", vocabulary, 16, split)


def test_blank_lines_at_the_end_of_a_short_text_are_not_its_dev_part(tmp_path):
    vocabulary = data.vocabulary(tiny(tmp_path / "bert"))
    (tmp_path / "text.txt").write_text("the cat sees a dog . " * 200 + "\n" * 3000)
    assert len(data.corpus_rows(tmp_path / "text.txt", vocabulary, 8, "dev")) > 1


def test_a_damaged_file_in_the_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TAMT_CACHE", str(tmp_path / "cache"))
    vocabulary = data.vocabulary(tiny(tmp_path / "bert"))
    (tmp_path / "text.txt").write_text("the cat sees a dog .\n" * 100)
    rows = data.corpus_rows(tmp_path / "text.txt", vocabulary, 8, "train")
    file = Path(rows.filename)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"{file}: damaged; remove it"):
        data.corpus_rows(tmp_path / "text.txt", vocabulary, 8, "train")


def test_a_split_that_is_not_there_is_refused(tmp_path):
    vocabulary = data.vocabulary(tiny(tmp_path / "bert"))
    (tmp_path / "text.txt").write_text("the cat sees a dog .\n" * 100)
    with pytest.raises(ValueError, match="split 'test': expected train or dev"):
        data.corpus_rows(tmp_path / "text.txt", vocabulary, 8, "test")
