"""The folder of a saved model: whole or not at all, whatever happens, and never in the place of anybody else's files."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
from local_assets import chains, write_model, write_text
from test_export import pruned

from lit_prune import PruningError, load_pruned, save_pruned
from lit_prune._files import check_writable, replacing, replacing_files
from lit_prune.cli import main
from lit_prune.io import output_folder
from lit_prune.io.manifest import MANIFEST
from lit_prune.io.output_folder import check_replaceable, is_mount_point, leftover, replacing_folder

CHANGES = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync")


def write(folder, content, **files):
    with replacing_folder(folder) as temporary:
        (temporary / "report").mkdir()
        for name in ("config.json", "model.safetensors", "report/page.html"):
            (temporary / name).write_text(content)
        for name, text in files.items():
            (temporary / name).write_text(text)


def state(folder):
    """What is in a folder, file by file."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def whole(folder, *contents):
    """Whether a folder holds one of the contents, the same in every file, and the list of its files."""
    found = state(folder)
    if set(found) != {"config.json", "model.safetensors", "report/page.html", MANIFEST}:
        return False
    texts = {text.decode() for name, text in found.items() if name != MANIFEST}
    return len(texts) == 1 and texts <= set(contents)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "out" / "model"
    write(folder, "old")
    return folder


def test_a_folder_of_ours_is_replaced_and_nothing_is_left_beside_it(model):
    write(model, "new")
    assert whole(model, "new")
    assert [p.name for p in model.parent.iterdir()] == ["model"]


# what a user may have put into the folder of a model
@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/last.ckpt", ".hidden", "report/mine.html"])
def test_a_folder_that_holds_anything_else_is_refused_by_name(model, name):
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("precious")
    before = state(model)
    for refused in (check_replaceable, lambda folder: write(folder, "new")):
        with pytest.raises(PruningError, match=rf"did not write.*{name}"):
            refused(model)
    assert state(model) == before
    assert [p.name for p in model.parent.iterdir()] == ["model"]


def test_what_appears_while_the_model_is_written_is_kept(model):
    with pytest.raises(PruningError, match=r"did not write.*late\.txt"), replacing_folder(model) as temporary:
        (temporary / "config.json").write_text("new")
        (model / "late.txt").write_text("precious")
    assert (model / "late.txt").read_text() == "precious"
    assert (model / "config.json").read_text() == "old"
    assert [p.name for p in model.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "content",
    [
        {"config.json": "{}"},
        {"config.json": "[" * 100_000},
        {"config.json": '{"pruning": {"digest": 5}}'},
        {MANIFEST: "null", "config.json": "{}"},
        {MANIFEST: '{"format": "lit_prune._files", "version": 1, "files": {"../notes": {}}}'},
        {"notes.txt": "precious"},
    ],
)
def test_a_folder_that_is_not_ours_is_refused(tmp_path, content):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text)
    before = state(folder)
    with pytest.raises(PruningError, match="holds no saved model"):
        write(folder, "new")
    assert state(folder) == before


def test_a_model_that_an_earlier_version_saved_is_known_by_its_files(tmp_path):
    folder = save_pruned(pruned(), tmp_path / "model")
    (folder / MANIFEST).unlink()
    (folder / "pruning").mkdir()
    (folder / "pruning" / "plan.json").write_text("{}")
    check_replaceable(folder)
    (folder / "pruning" / "notes.txt").write_text("precious")
    with pytest.raises(PruningError, match=r"did not write.*pruning/notes\.txt"):
        save_pruned(pruned(), folder)
    (folder / "pruning" / "notes.txt").unlink()
    save_pruned(pruned(), folder)
    assert (folder / MANIFEST).exists() and not (folder / "pruning").exists()


@pytest.mark.parametrize("path", [".", "../model", "report/..", "..", "./", "../../out/model"])
def test_the_working_directory_and_those_around_it_are_refused(model, path, monkeypatch):
    monkeypatch.chdir(model)
    before = state(model)
    with pytest.raises(PruningError, match="the working directory"):
        save_pruned(pruned(), path)
    assert state(model) == before


def test_a_path_that_leads_back_replaces_the_folder_itself(model, monkeypatch):
    monkeypatch.chdir(model.parent.parent)
    write("out/model/report/..", "new")
    assert whole(model, "new")


@pytest.mark.parametrize("path", ["/", "home", "home/.."])
def test_the_root_and_the_home_are_refused(tmp_path, path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(PruningError, match=r"the root|the home"):
        check_replaceable(tmp_path / path)


def test_a_link_is_followed(model, tmp_path):
    (tmp_path / "link").symlink_to(model)
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and whole(model, "new")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent" / "model")
    write(tmp_path / "nowhere", "new")
    assert whole(tmp_path / "absent" / "model", "new")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(PruningError, match="circle"):
        check_replaceable(tmp_path / "circle")
    # a link inside is not what was written
    shutil.move(model / "report", tmp_path / "elsewhere")
    (model / "report").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PruningError, match=r"did not write.*report"):
        write(model, "newer")
    assert state(tmp_path / "elsewhere")


def test_the_sources_are_never_written_to(model, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    for output, said in (("out/model", "is"), ("link", "is"), ("out/model/new", "is inside"), ("out", "contains")):
        with pytest.raises(PruningError, match=rf"The output {output} {said} .*model, which is read"):
            check_replaceable(output, [model])
    with pytest.raises(PruningError, match="contains"):
        check_replaceable(model, ["no/such-repository", model / "config.json"])
    check_replaceable("out/other", [model, "no/such-repository", "package:absent"])


@pytest.mark.parametrize("output", ["dense", "dense/../dense", "dense/pruned", ".", "dense/.."])
def test_the_command_never_destroys_what_it_reads(tmp_path, output, monkeypatch, capsys):
    dense = write_model(tmp_path / "dense")
    before = state(dense)
    monkeypatch.chdir(tmp_path)
    text = write_text(tmp_path / "text.txt", chains(60))
    for arguments in (["apply", "dense", output, f"--calibration.text={text}"], ["convert", "a.ckpt", "dense", output]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "lit-prune: error: The output" in " ".join(capsys.readouterr().err.split())
    assert state(dense) == before


def test_the_command_in_the_folder_of_a_model(tmp_path, monkeypatch, capsys):
    write_model(tmp_path / "dense")
    folder = save_pruned(pruned(), tmp_path / "model")
    before = state(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit):
        main(["apply", "../dense", "."])
    assert "is the working directory" in " ".join(capsys.readouterr().err.split())
    assert state(folder) == before


def test_the_command_puts_its_report_under_the_same_protection(tmp_path):
    dense = write_model(tmp_path / "dense")
    text = write_text(tmp_path / "text.txt", chains(60))
    options = [f"--calibration.text={text}", "--calibration.batches=2", "--calibration.block_size=16"]
    options += ["--pruning.importance=magnitude", "--pruning.repair=null", "--calibration.held_out=0"]
    for _ in range(2):
        main(["apply", str(dense), str(tmp_path / "out"), *options])
    assert "pruning/plan.json" in json.loads((tmp_path / "out" / MANIFEST).read_text())["files"]
    # drawn anew, it is still what was written
    main(["report", str(tmp_path / "out" / "pruning")])
    check_replaceable(tmp_path / "out")


def killed_at(call, change):
    """Make a change in a process of its own that is killed at one of its calls of the system; whether it came so far."""
    child = os.fork()
    if not child:
        count = 0

        def counting(function):
            def run(*args, **kwargs):
                nonlocal count
                if count == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return function(*args, **kwargs)

            return run

        for name in CHANGES:
            setattr(os, name, counting(getattr(os, name)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.filterwarnings("ignore:.*a process (that )?was killed")
def test_a_process_killed_at_any_point_leaves_a_whole_folder(tmp_path):
    call, restored = 0, 0
    while True:
        folder = tmp_path / str(call) / "model"
        write(folder, "old")
        if not killed_at(call, lambda folder=folder: write(folder, "new")):
            break
        aside = leftover(folder)
        restored += aside is not None
        assert whole(folder if aside is None else aside, "old", "new")
        if aside is not None:
            with pytest.raises(FileNotFoundError, match=rf"{aside.name}"):
                load_pruned(folder)
        # one more time, killed at the same call, and then to the end
        killed_at(call, lambda folder=folder: write(folder, "newer"))
        assert whole(leftover(folder) or folder, "old", "new", "newer")
        write(folder, "newest")
        assert whole(folder, "newest")
        assert not [p.name for p in folder.parent.iterdir() if p.name != "model" and ".new-" not in p.name]
        call += 1
    assert whole(folder, "new")
    assert call > 12 and restored >= 1


def test_what_a_killed_process_left_is_put_back_and_named(model):
    calls = 0
    while True:
        killed_at(calls, lambda: write(model, "new"))
        if leftover(model):
            break
        calls += 1
        shutil.rmtree(model.parent)
        write(model, "old")
    with pytest.warns(UserWarning, match="killed") as warned:
        write(model, "newest")
    said = " ".join(str(w.message) for w in warned)
    assert "was put back from .model.old-" in said and ".model.new-" in said


def test_an_interrupt_while_the_folders_change_places_changes_nothing(model, monkeypatch):
    rename = os.rename

    def interrupted(source, target):
        if Path(target) == model and ".new-" in str(source):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(model, "new")
    assert whole(model, "old")
    assert [p.name for p in model.parent.iterdir()] == ["model"]


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o027, 0o077])
@pytest.mark.parametrize("setgid", [0, stat.S_ISGID])
def test_a_folder_has_the_permissions_of_any_other(tmp_path, mask, setgid):
    with umask(mask):
        parent = tmp_path / "parent"
        parent.mkdir()
        parent.chmod(0o755 | setgid)
        (parent / "stock").mkdir()
        for content in ("old", "new"):
            write(parent / "model", content)
            assert whole(parent / "model", content)
            assert (parent / "model").stat().st_mode == (parent / "stock").stat().st_mode


# what is special in a pattern, and what leaves no room for a longer name beside it: bytes, not characters, are counted
NAMES = ["**", "[ab]", "[", "a?*", "a\\b", "n" * 241, "n" * 242, "n" * 255, "é" * 127, "n" + "雪" * 84, "n." * 127]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_any_name_that_a_folder_can_have(tmp_path, name):
    folder = tmp_path / name
    for content in ("old", "new"):
        write(folder, content)
        assert whole(folder, content) and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_what_is_left_is_found_whatever_the_name(tmp_path, name):
    folder, other = tmp_path / name, tmp_path / f"{name[:-1]}o"
    write(folder, "old")

    def killed():
        # between the two moves
        with replacing_folder(folder) as temporary:
            shutil.copytree(folder, temporary, dirs_exist_ok=True)
            os.rename(folder, output_folder._made(tmp_path, output_folder._prefix(folder, "old")))
            os._exit(0)

    child = os.fork()
    if not child:
        killed()
    os.waitpid(child, 0)
    assert leftover(other) is None
    assert whole(leftover(folder), "old")
    with pytest.warns(UserWarning, match="killed") as warned:
        write(folder, "new")
    said = [str(w.message) for w in warned]
    assert len(said) == 2 and "It was put back from" in said[0] and "has written of" in said[1]
    assert whole(folder, "new") and len(os.listdir(tmp_path)) == 2


def test_what_is_left_of_a_folder_with_a_longer_name_is_not_taken(tmp_path):
    write(tmp_path / "model.old-1", "other")
    os.rename(tmp_path / "model.old-1", tmp_path / ".model.old-1.old-12345678")
    write(tmp_path / ".model.new-1.new-12345678", "other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert leftover(tmp_path / "model") is None
        write(tmp_path / "model", "new")
    assert whole(tmp_path / "model", "new")
    assert whole(leftover(tmp_path / "model.old-1"), "other")


@pytest.mark.parametrize("name", ["n" * 256, "é" * 128, "n" * 300 + "/model"])
def test_names_that_are_too_long_are_refused_before_any_work(tmp_path, name):
    for check in (check_replaceable, check_writable, lambda path: check_writable(path, file=True)):
        with pytest.raises(PruningError, match=r"has (256|300) bytes; expected names of 255 at most"):
            check(tmp_path / name)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["n" * 255, "n" * 250 + ".gguf", "é" * 125 + ".gguf", "n." + "x" * 230])
def test_a_file_has_any_name_that_it_can_have(tmp_path, name):
    with replacing(tmp_path / name) as temporary:
        assert temporary.endswith(Path(name).suffix)
        Path(temporary).write_text("new")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("moved", ["old", "new"])
def test_a_folder_that_cannot_be_moved_is_left_as_it_was(model, moved, monkeypatch):
    rename = os.rename

    def busy(source, target):
        if (Path(source) if moved == "old" else Path(target)) == model and ".old-" not in str(source):
            raise OSError(errno.EBUSY, "Device or resource busy", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", busy)
    with pytest.raises(PruningError, match=r"cannot be replaced \(Device or resource busy\)"):
        write(model, "new")
    assert whole(model, "old")
    assert [p.name for p in model.parent.iterdir()] == ["model"]


@contextmanager
def mounted(folder, *options):
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_mount_point_is_filled_if_it_is_empty_and_refused_otherwise(tmp_path):
    (tmp_path / "volume").mkdir()
    for options in (["-t", "tmpfs", "-o", "size=1m", "tmpfs"], ["--bind", str(tmp_path / "volume")]):
        with mounted(tmp_path / "a mount", *options) as folder:
            assert is_mount_point(folder)
            with pytest.raises(RuntimeError), replacing_folder(folder) as temporary:
                (temporary / "config.json").write_text("half")
                raise RuntimeError
            assert not any(folder.iterdir())
            write(folder, "old")
            assert whole(folder, "old")
            with pytest.raises(PruningError, match=r"is a mount point.*config\.json"):
                write(folder, "new")
            with pytest.raises(PruningError, match="holds the mount point"):
                check_replaceable(tmp_path)
            assert whole(folder, "old")
            write(folder / "inside", "new")
            write(folder / "inside", "newer")
            assert whole(folder / "inside", "newer")


def test_killed_while_a_mount_point_is_filled_the_files_are_named(tmp_path):
    call = 0
    while True:
        with mounted(tmp_path / str(call), "-t", "tmpfs", "-o", "size=1m", "tmpfs") as folder:
            if not killed_at(call, lambda folder=folder: write(folder, "new")):
                assert whole(folder, "new")
                break
            if any(folder.iterdir()):
                with pytest.raises(PruningError, match=r"\.lit_prune-new-|config\.json"):
                    check_replaceable(folder)
                assert whole(folder, "new") or not (folder / MANIFEST).exists() or call > 10
        call += 1
    assert call > 8


def test_a_full_disk_leaves_what_was_there(tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=200k", "tmpfs") as disk:
        folder = save_pruned(pruned(), disk / "model")
        before = state(folder)
        (disk / "filler").write_bytes(bytes(60_000))
        with pytest.raises((OSError, PruningError), match=r"No space left|could not be written"):
            save_pruned(pruned(), folder)
        assert state(folder) == before
        assert sorted(p.name for p in disk.iterdir()) == ["filler", "model"]
        # a report, too, is there as a whole or not at all
        for write_files in (replacing_files, lambda place: replacing(place / "file")):
            with pytest.raises(OSError, match="No space left"), write_files(disk / "new" / "report") as temporary:
                target = Path(temporary)
                for name in ("a", "b", "c"):
                    (target / name if target.is_dir() else target).write_bytes(bytes(60_000))
                    assert (disk / "new").exists()
                if not target.is_dir():
                    target.write_bytes(bytes(300_000))
            assert sorted(p.name for p in disk.iterdir()) == ["filler", "model"]


def test_a_limit_on_the_size_of_files_does_the_same(tmp_path):
    folder = save_pruned(pruned(), tmp_path / "model")
    before = state(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises((OSError, PruningError), match=r"too large|could not be written"):
            save_pruned(pruned(), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert state(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_whether_an_output_can_be_written_is_found_out_before_any_work(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    with pytest.raises(PruningError, match="file is not a folder"):
        check_writable(tmp_path / "file" / "out")
    with pytest.raises(PruningError, match="file is not a folder"):
        check_replaceable(tmp_path / "file" / "deeper" / "out")
    # nobody, root included, writes there
    with pytest.raises(PruningError, match=r"/proc/1 failed|/proc failed"):
        check_replaceable("/proc/1/out")
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "ro", "tmpfs") as disk:
        with pytest.raises(PruningError, match="Read-only file system"):
            check_writable(disk / "out")
        with pytest.raises(PruningError, match="Read-only file system"):
            check_replaceable(disk)


def test_what_is_no_ordinary_file_is_not_replaced(tmp_path):
    """A device, for instance: as root, a rename would put a file in its place."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(PruningError, match="no ordinary file"), replacing(tmp_path / name):
            pytest.fail("it was opened for writing")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_link_to_a_file_stays(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    with replacing(tmp_path / "link") as temporary:
        Path(temporary).write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
