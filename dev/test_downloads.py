"""Downloads and archives: what data.py and glue_squad.py fetch, keep and unpack.

    python -m pytest dev/test_downloads.py
"""

import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

import data
import glue_squad
from test_tamt import ROOT

# ---------------------------------------------------------------------------------------------------
# data: downloads and archives
# ---------------------------------------------------------------------------------------------------


BODY = bytes(range(256)) * 2000  # 512,000 bytes
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server on this machine. server.files: {path: bytes or a function that answers}; server.requests:
    what was asked for. It continues downloads; with server.breaks_after it hangs up once, after so many
    bytes."""
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        files, requests, breaks_after = {}, [], None

        def do_GET(self):
            self.requests.append((self.path, self.headers))
            content = self.files.get(self.path)
            if callable(content):
                return content(self)
            if content is None:
                return self.reply(404)
            start = int(re.sub("[^0-9]", "", self.headers.get("Range", "")) or 0)
            content_range = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.reply(206 if start else 200, content[start:], Content_Range=content_range)

        def reply(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in ({"Content_Length": len(body)} | headers).items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(body[:self.breaks_after])
            self.close_connection = self.breaks_after is not None
            type(self).breaks_after = None

        def log_message(self, *_):
            pass

    for name in list(os.environ):
        if re.search("(?i)^HF_|_OFFLINE|proxy", name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TAMT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(data, "PAUSES", (0.01, 0.01, 0))
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.handle_error = lambda *_: None  # clients hang up
    threading.Thread(target=http_server.serve_forever, args=(0.01,), daemon=True).start()
    Handler.url = f"http://127.0.0.1:{http_server.server_address[1]}"
    yield Handler
    http_server.shutdown()
    http_server.server_close()


def left(folder):
    """The files of a folder without the hidden ones, which are locks and remembered hashes."""
    return sorted(path.name for path in Path(folder).iterdir() if not path.name.startswith("."))


def python(code, **options):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data\n{code}"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, **options)


def test_a_file_is_fetched_once(server, tmp_path):
    server.files["/f"] = BODY
    for _ in range(2):
        path = data.fetch(server.url + "/f", tmp_path / "new" / "f", len(BODY), SHA256)
        assert path.read_bytes() == BODY
    assert len(server.requests) == 1 and left(path.parent) == ["f"]
    assert server.requests[0][1]["User-Agent"].startswith("tamt/")


def test_a_download_that_breaks_off_is_continued(server, tmp_path):
    server.files["/f"] = BODY
    server.breaks_after = 100_000
    assert data.fetch(server.url + "/f", tmp_path / "f", len(BODY), SHA256).read_bytes() == BODY
    ranges = [headers["Range"] for _, headers in server.requests]
    assert ranges == [None, "bytes=65536-"]  # one whole chunk had arrived


def test_the_next_mirror_is_tried_and_an_error_names_all_of_them(server, tmp_path):
    server.files |= {"/good": BODY, "/bad": BODY[::-1]}
    urls = [f"{server.url}/{name}" for name in ("gone", "bad", "good")]
    with pytest.raises(OSError) as caught:
        data.fetch(urls[:2], tmp_path / "f", len(BODY), SHA256)
    for words in (f"{urls[0]}: 404", f"{urls[1]}: has hash", f"put the file at {tmp_path / 'f'} by hand"):
        assert words in str(caught.value)
    assert left(tmp_path) == []
    assert data.fetch(urls, tmp_path / "f", len(BODY), SHA256).read_bytes() == BODY


def test_a_complete_part_file_is_hashed_and_not_fetched_again(server, tmp_path):
    (tmp_path / "f.part").write_bytes(BODY)  # its program was killed before it could rename it
    assert data.fetch(server.url + "/f", tmp_path / "f", len(BODY), SHA256).read_bytes() == BODY
    assert server.requests == [] and left(tmp_path) == ["f"]


def test_two_processes_fetch_a_file_once_and_continue_what_a_third_left(server, tmp_path):
    server.files["/f"] = BODY
    (tmp_path / "f.part").write_bytes(BODY[:70_000])
    code = f"data.fetch('{server.url}/f', '{tmp_path}/f', 512000, '{SHA256}')"
    processes = [python(code), python(code)]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["", ""]
    assert [headers["Range"] for _, headers in server.requests] == ["bytes=70000-"]
    assert (tmp_path / "f").read_bytes() == BODY and left(tmp_path) == ["f"]


def test_a_file_put_there_by_hand_is_hashed_once(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(BODY[1:])
    with pytest.raises(ValueError, match="f has 511999 bytes, expected 512000: delete it, or put the"):
        data.fetch("-", path, len(BODY), SHA256)
    path.write_bytes(BODY[::-1])
    with pytest.raises(ValueError, match=f"f has hash .* expected {SHA256}: delete it"):
        data.fetch("-", path, len(BODY), SHA256)

    path.write_bytes(BODY)
    hashed = []
    file_sha256 = data.file_sha256
    monkeypatch.setattr(data, "file_sha256", lambda each: hashed.append(each) or file_sha256(each))
    for _ in range(2):
        data.fetch("-", path, len(BODY), SHA256)
    assert hashed == [path]


HUB_MODEL = data.NamedModel("a/b", (data.Download("x"),))


def test_the_hub_announces_the_hash_and_only_the_hub_gets_the_token(server, tmp_path, monkeypatch):
    elsewhere = server.url.replace("127.0.0.1", "localhost")
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    server.files["/a/b/resolve/main/x"] = lambda handler: handler.reply(
        302, Location=f"{elsewhere}/cdn", X_Linked_Etag=f'W/"{SHA256}"')
    server.files["/cdn"] = BODY
    folder = data.hub_model(HUB_MODEL)
    assert folder == tmp_path / "cache" / "models" / "a--b@main" and (folder / "x").read_bytes() == BODY
    assert [headers["Authorization"] for _, headers in server.requests] == ["Bearer hf_secret", None]

    (folder / "x").unlink()
    server.files["/cdn"] = BODY[::-1]
    with pytest.raises(OSError, match=f"has hash .* expected {SHA256}"):
        data.hub_model(HUB_MODEL)


def test_offline_the_hubs_own_cache_still_counts(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="OFFLINE is set.*put the file at .*/models/a--b@main/x by hand"):
        data.hub_model(HUB_MODEL)
    theirs = tmp_path / "hf" / "hub" / "models--a--b"
    (theirs / "refs").mkdir(parents=True)
    (theirs / "refs" / "main").write_text("abc")
    (theirs / "snapshots" / "abc").mkdir(parents=True)
    (theirs / "snapshots" / "abc" / "x").write_text("theirs")
    assert data.hub_model(HUB_MODEL) == theirs / "snapshots" / "abc"


def zip_file(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tar_file(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def test_a_model_comes_by_name_as_googles_zip_if_the_hub_fails(server, tmp_path, monkeypatch):
    members = {"a.json": b"{}", "bert_model.ckpt.index": b"", "x/._a.bin": b""}
    zipped = zip_file(tmp_path / "m.zip", members)
    server.files["/2020_02_20/uncased_L-2_H-128_A-2.zip"] = zipped.read_bytes()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(data, "GOOGLE", server.url)
    assert left(data.model_path("bert-tiny")) == ["a.json", "bert_model.ckpt.index", "x"]
    with pytest.raises(OSError, match="(?s)404.*404"):  # both reasons
        data.model_path("bert-mini")


def test_a_model_comes_as_a_path_or_an_archive_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("TAMT_CACHE", str(tmp_path / "cache"))
    archive = tar_file(tmp_path / "r.tar.gz", {"r/model.pt": b"", "r/dict.txt": b""})
    assert left(data.model_path(archive)) == ["dict.txt", "model.pt"]
    (tmp_path / "bert.ckpt.index").touch()
    assert data.model_path(tmp_path / "bert.ckpt") == tmp_path / "bert.ckpt"  # a TensorFlow prefix
    with pytest.raises(ValueError, match="unknown model 'bert-bas': neither a path nor one of bert-base, "):
        data.model_path("bert-bas")


def test_a_corpus_comes_by_name_from_the_first_mirror_that_has_it(server, tmp_path, monkeypatch):
    members = {"top/wiki.train.raw": b"t", "top/wiki.valid.raw": b"v"}
    server.files["/t"] = zip_file(tmp_path / "t.zip", members).read_bytes()
    mirrors = (server.url + "/gone", server.url + "/t")
    monkeypatch.setitem(data.CORPORA, "wikitext-2", data.Download("x.zip", urls=mirrors))
    assert left(data.corpus_folder("wikitext-2")) == ["wiki.train.raw", "wiki.valid.raw"]


@pytest.mark.parametrize("make", [zip_file, tar_file])
def test_an_archive_unpacks_as_a_whole_or_not_at_all(tmp_path, make):
    members = {"top/a.txt": b"hello", "top/sub/b.bin": b"\0" * 1000}
    archive = make(tmp_path / "archive", members)
    folder = data.unpack(archive, tmp_path / "all")
    assert {name: (folder / name).read_bytes() for name in members} == members
    only_text = data.unpack(archive, tmp_path / "text", (".txt",))
    assert [path.name for path in only_text.rglob("*.*")] == ["a.txt"]

    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(ValueError, match=f"cannot unpack {archive}: "):
        data.unpack(archive, tmp_path / "none")
    assert left(tmp_path) == ["all", "archive", "text"]


def test_two_processes_append_to_one_file(tmp_path):
    code = "for i in range(40): data.append_line('r.jsonl', {'who': %d, 'i': i, 'text': 'x' * 5000})"
    processes = [python(code % who, cwd=tmp_path) for who in range(2)]
    assert [process.communicate(timeout=120)[0] for process in processes] == [""] * 2
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    expected = [(who, i) for who in range(2) for i in range(40)]
    assert sorted((line["who"], line["i"]) for line in lines) == expected


def test_a_line_that_a_killed_program_left_unfinished_does_not_swallow_the_next(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"a": 1}\n{"a": ')
    data.append_line(tmp_path / "r.jsonl", {"a": 3})
    assert (tmp_path / "r.jsonl").read_text().split("\n") == ['{"a": 1}', '{"a": ', '{"a": 3}', ""]


# ---------------------------------------------------------------------------------------------------
# glue_squad: only what is read is fetched
# ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fetched(monkeypatch):
    """The names of the files that download() fetches; archives hold one table."""
    names = []

    def fetch(urls, path, size=None, sha256=None):
        names.append(path.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr(f"{path.stem}/train.tsv", "gold_label\tsentence1\tsentence2\nneutral\ta\tb\n")
        else:
            path.write_text("index\tsentence1\tsentence2\n0\tc\td\n")
        return path

    monkeypatch.setattr(data, "fetch", fetch)
    return names


def test_mnli_trains_without_the_diagnostic_file(tmp_path, fetched):
    folder = glue_squad.download("mnli", tmp_path, ["train", "dev", "dev_mm"])
    assert fetched == ["MNLI.zip"]
    assert glue_squad.load_glue("mnli", "train", folder) == [("a", "b", 1)]


def test_mnlis_diagnostic_file_is_fetched_when_it_is_read(tmp_path, fetched):
    folder = glue_squad.download("mnli", tmp_path, ["train", "ax"])
    assert fetched == ["MNLI.zip", "AX.tsv"]
    assert glue_squad.load_glue("mnli", "ax", folder) == [("c", "d", None)]


def test_an_unpacked_archive_is_not_fetched_again(tmp_path, fetched):
    glue_squad.download("rte", tmp_path, ["train"])
    glue_squad.download("rte", tmp_path, ["train"])
    assert fetched == ["RTE.zip"]


def test_mrpc_trains_without_its_test_file(tmp_path, fetched):
    glue_squad.download("mrpc", tmp_path, ["train", "dev"])
    assert fetched == ["msr_paraphrase_train.txt", "mrpc_dev_ids.tsv"]
