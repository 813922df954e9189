"""Index of a server: pictures and their errors, moved images, and reload after a save."""

import contextlib
import gc
import logging
import os
import shutil
import time
import weakref
from pathlib import Path

import pytest
from serving import drawn, encoded, running, saved_index, small_bundle

from vlm.errors import ConfigError
from vlm.heads.retrieval import RetrievalIndex
from vlm.serving import served_index
from vlm.serving.batched import Batched


@pytest.fixture
def folder(bundle, tmp_path):
    """Folder of six pictures, and in `index` their index."""
    return saved_index(bundle, tmp_path, {"number": list(range(6))}).parent


@pytest.fixture
def quick(monkeypatch):
    """Look for a changed index every 20 ms."""
    monkeypatch.setattr(served_index.ServedIndex.follow, "__defaults__", (0.02,))


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def about(server):
    return server.ask("/v1/index").json


def test_an_index_of_relative_paths_shows_its_pictures_elsewhere(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    drawn(1).save("photos/a.png")
    index = RetrievalIndex(bundle)
    index.add([Path("photos/a.png")])
    index.save("index")
    monkeypatch.chdir("/")
    with running(bundle, index=tmp_path / "index") as server:
        assert server.ask("/v1/items/0").json["id"] == str(tmp_path / "photos/a.png")
        assert server.ask("/v1/items/0/picture").status == 200


def test_moved_images_are_found_in_their_new_folder(bundle, folder, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    for path in folder.glob("*.png"):
        path.rename(new / path.name)
    with running(bundle, index=folder / "index") as server:
        reply = server.ask("/v1/items/2/picture")
        assert (reply.status, reply.json["error"]["code"]) == (404, "picture_missing")
        assert f"there is no file {folder}/02.png" in reply.json["error"]["message"]
        assert "--root OLD=FOLDER" in reply.json["error"]["message"]
    with running(bundle, index=folder / "index", moved={str(folder): str(new)}) as server:
        assert server.ask("/v1/items/2/picture").status == 200
        assert server.ask("/v1/items/2").json["id"] == str(new / "02.png")
    with (
        contextlib.closing(Batched(bundle)) as model,
        pytest.raises(ConfigError, match="no image of the index lies in '/elsewhere'"),
    ):
        served_index.ServedIndex(folder / "index", model, {"/elsewhere": "/"}).open()


def test_a_picture_that_cannot_be_read_says_why(bundle, folder):
    (folder / "01.png").write_bytes(b"<html>")
    (folder / "03.png").unlink()
    (folder / "directory").mkdir()
    (folder / "03.png").symlink_to("directory")
    with running(bundle, index=folder / "index") as server:
        for number, reason in ((1, "is a web page"), (3, "director")):
            for route in ("picture", "original"):
                reply = server.ask(f"/v1/items/{number}/{route}")
                error = reply.json["error"]
                assert (reply.status, error["code"]) == (404, "picture_unreadable")
                assert reason in error["message"] or "is a folder" in error["message"]
                assert f"0{number}.png" in error["message"]


def test_originals_are_files_with_the_type_of_their_content(bundle, folder):
    drawn(0).save(folder / "00.png", "JPEG")
    with running(bundle, index=folder / "index") as server:
        for number, kind in ((0, "image/jpeg"), (1, "image/png")):
            reply = server.ask(f"/v1/items/{number}/original")
            assert reply.status == 200
            assert reply.headers["Content-Type"] == kind
            assert reply.headers["X-Content-Type-Options"] == "nosniff"
            assert reply.body == (folder / f"{number:02}.png").read_bytes()
        assert server.ask("/v1/items/6/original").status == 404


def test_an_item_is_found_by_its_id(bundle, folder):
    with running(bundle, index=folder / "index") as server:
        reply = server.ask(f"/v1/items?id={folder}/04.png")
        assert reply.json["item"] == 4
        reply = server.ask("/v1/items?id=nothing")
        assert (reply.status, reply.json["error"]["code"]) == (404, "no_item")
        assert "no item with the id 'nothing'" in reply.json["error"]["message"]


def test_a_picture_is_sent_again_only_if_it_changed(bundle, folder):
    with running(bundle, index=folder / "index") as server:
        tag = server.ask("/v1/items/0/picture").headers["ETag"]
        reply = server.ask("/v1/items/0/picture", headers={"If-None-Match": tag})
        assert (reply.status, reply.body) == (304, b"")
        assert server.ask("/v1/items/1/picture", headers={"If-None-Match": tag}).status == 200


@pytest.mark.slow
def test_a_saved_index_is_served_without_a_restart(bundle, folder, quick):
    with running(bundle, index=folder / "index") as server:
        before = about(server)
        picture = server.ask("/v1/items/5/picture").body
        index = RetrievalIndex.load(folder / "index", bundle)
        index.remove(folder / "02.png")
        drawn(9).save(folder / "09.png")
        drawn(8).save(folder / "05.png")
        index.update([folder / "09.png", folder / "05.png"], metadata={"number": [9, 5]})
        index.save(folder / "index")
        until(lambda: about(server)["generation"] != before["generation"])
        # Items keep their numbers; a new one gets a new number.
        assert about(server)["count"] == 6
        names = [server.ask(f"/v1/items/{n}").json.get("id", "")[-6:] for n in range(7)]
        assert names == ["00.png", "01.png", "", "03.png", "04.png", "05.png", "09.png"]
        reply = server.ask("/v1/search", {"query": [{"item": 2}]})
        assert reply.status == 404
        assert "no longer in the index" in reply.json["error"]["message"]
        assert server.ask("/v1/items/5/picture").body != picture
        data = server.ask("/v1/search", {"query": "red", "k": 9}).json["data"]
        assert sorted(found["item"] for found in data) == [0, 1, 3, 4, 5, 6]
        assert 'vlm_index_reloads_total{result="done"} 1.0' in server.ask("/metrics").body.decode()


@pytest.mark.slow
def test_a_replaced_index_leaves_the_memory(bundle, folder, quick):
    with running(bundle, index=folder / "index") as server:
        server.ask("/v1/search", {"query": "red"})
        old, before = weakref.ref(server.service.gallery.index), about(server)
        gc.collect()
        gc.freeze()  # as `serve` does
        try:
            index = RetrievalIndex.load(folder / "index", bundle)
            index.remove(folder / "02.png")
            index.save(folder / "index")
            until(lambda: about(server)["generation"] != before["generation"])
            until(lambda: old() is None)
        finally:
            gc.unfreeze()


@pytest.mark.slow
def test_an_index_that_cannot_be_opened_is_logged_and_the_present_one_stays(
    bundle, folder, quick, caplog, tmp_path
):
    good = tmp_path / "good"
    shutil.copytree(folder / "index", good)
    with running(bundle, index=folder / "index") as server:

        def logged(text):
            return sum(text in record.getMessage() for record in caplog.records)

        (folder / "index" / "index.json").write_text("{")
        until(lambda: logged("is not JSON"))
        assert server.ask("/v1/search", {"query": "red"}).status == 200
        other = RetrievalIndex(small_bundle(seed=1, name="other"))
        other.add([folder / "00.png"])
        other.save(folder / "index", overwrite=True)
        until(lambda: logged("embeds differently"))
        assert about(server)["count"] == 6
        shutil.rmtree(folder / "index")
        until(lambda: logged("holds no index"))
        assert server.ask("/v1/items/0/picture").status == 200
        caplog.set_level(logging.INFO, "vlm.serving.served_index")
        shutil.copytree(good, folder / "index")
        index = RetrievalIndex.load(folder / "index", bundle)
        index.remove(index.ids[0])
        index.save(folder / "index")
        until(lambda: logged("now has its 5 items"))
    messages = [record.getMessage() for record in caplog.records]
    assert len(set(messages)) == len(messages)  # each problem once


def test_a_link_that_is_switched_to_another_index_is_followed(bundle, folder, quick, tmp_path):
    (tmp_path / "more").mkdir()
    more = saved_index(bundle, tmp_path / "more", {"number": list(range(9))})
    link = tmp_path / "current"
    link.symlink_to(folder / "index")
    with running(bundle, index=link) as server:
        assert about(server)["count"] == 6
        (tmp_path / "next").symlink_to(more)
        os.replace(tmp_path / "next", link)
        until(lambda: about(server)["count"] == 9)


def test_an_unchanged_index_costs_one_stat(bundle, folder, monkeypatch):
    with contextlib.closing(Batched(bundle)) as model:
        source = served_index.ServedIndex(folder / "index", model)
        gallery = source.open()
        monkeypatch.setattr(served_index.index_folder, "generation", None)
        assert not source.changed(gallery)


def test_a_dropped_image_is_not_stored_as_a_path(bundle, folder):
    """Embeddings and bytes get running numbers, which have no picture."""
    index = RetrievalIndex(bundle)
    index.add([encoded(drawn(1))])
    index.save(folder / "numbers")
    with running(bundle, index=folder / "numbers") as server:
        reply = server.ask("/v1/items/0/picture")
        assert (reply.status, reply.json["error"]["code"]) == (404, "no_picture")
