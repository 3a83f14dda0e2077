"""The doctor finds what is unusual, tells what to do, and changes nothing."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from seedvc_ckpt import SEED_VC, CheckpointStore
from seedvc_ckpt.doctor import diagnose


def found(run, **options):
    """(problem, subject, what, remedy) of each finding."""
    store = CheckpointStore(run, read_only=True)
    return [(f.problem, f.subject, f.what, f.remedy) for f in diagnose(store, **options)]


def subjects(run, **options):
    return [subject for _, subject, _, _ in found(run, **options)]


@pytest.fixture
def healthy(run, filled):
    """A run of three checkpoints, as a trainer leaves it."""
    filled(run, 10, 20, 30).close()
    (run / "metrics.jsonl").touch()
    (run / "config.yml").touch()
    return run


def test_a_healthy_run_has_nothing_unusual(healthy, snapshot):
    """A trainer's own files are no finding, and looking changes nothing."""
    before = snapshot(healthy)
    assert found(healthy) == []
    assert snapshot(healthy) == before


def test_damage_is_named_with_its_tensor(healthy, damage):
    """A damaged checkpoint is a problem; a quick look does not read that far."""
    damage(healthy / SEED_VC.format(20))
    ((problem, subject, what, _remedy),) = found(healthy)
    assert (problem, subject) == (True, SEED_VC.format(20))
    assert "net['cfm']['weight']" in what
    assert found(healthy, verify=False) == []


def test_a_trainer_that_started_over_shows_in_the_times(healthy):
    """A smaller step that was written last is what Seed-VC's own resume leaves; both ways on are told."""
    now = time.time()
    os.utime(healthy / SEED_VC.format(30), (now - 500, now - 500))
    ((problem, subject, what, remedy),) = found(healthy)
    assert (problem, subject) == (True, SEED_VC.format(20))
    assert SEED_VC.format(30) in what
    assert "started over at a lower step" in what
    assert f"rewind {healthy} 20" in remedy


def test_two_epochs_of_a_step(healthy):
    """Two files of one step are a problem."""
    (healthy / SEED_VC.format(20, 1)).write_bytes((healthy / SEED_VC.format(20)).read_bytes())
    assert any(SEED_VC.format(20, 1) in what and "both step 20" in what for _, _, what, _ in found(healthy))


def test_what_else_lies_in_the_folder(healthy, filled):
    """Dead writers' files, stray copies, orphaned pins, foreign files and what was set aside: each is a note."""
    store = filled(healthy, 40)
    store.rewind(30)
    store.close()
    dead = ".tmp-" + "0" * 16 + f"-999999999-1-{os.uname().nodename}"
    living = ".tmp-" + "1" * 16 + "-1-1-elsewhere"
    strays = ["DiT_epoch_00000_step_00010_copy.pth", dead, living, f"{SEED_VC.format(99)}.pin", "notes.txt"]
    for name in strays:
        (healthy / name).touch()
    findings = found(healthy)
    assert not any(problem for problem, *_ in findings)
    assert {subject for _, subject, _, _ in findings} == {*strays, "aside/"}
    remedies = {subject: remedy for _, subject, _, remedy in findings}
    assert f"seedvc-ckpt gc {healthy}" in remedies[dead]
    assert "holds 1 file that was set aside" in str(findings)


def test_the_writer_is_named(healthy):
    """Who holds the lease now is told; who held it before is not."""
    script = (
        "import sys; from seedvc_ckpt import CheckpointStore\n"
        "store = CheckpointStore(sys.argv[1]); store.acquire(); print('holds', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(healthy)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout.readline() == b"holds\n"
        ((problem, subject, what, _),) = found(healthy)
        writer.stdin.close()
    assert (problem, subject) == (False, str(healthy))
    assert f"process {writer.pid} on " in what
    assert found(healthy) == []


def test_a_folder_that_anybody_may_change(healthy):
    """A folder that all may write is a problem, unless only owners may delete in it."""
    healthy.chmod(0o777)
    assert any("any user" in what for problem, _, what, _ in found(healthy) if problem)
    healthy.chmod(0o1777)
    assert found(healthy) == []


def test_a_run_behind_a_link(healthy, tmp_path):
    """A run that is a link elsewhere is told, with where it leads."""
    (tmp_path / "link").symlink_to(healthy)
    ((problem, _, what, _),) = found(tmp_path / "link")
    assert not problem
    assert str(healthy) in what


def test_a_disk_that_is_nearly_full(tmp_path):
    """Room for less than two more checkpoints, and a file system in memory, are problems."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    try:
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("file systems can't be mounted here")
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    try:
        with CheckpointStore(place) as store:
            store.save({"x": torch.zeros(120_000)}, 1)
        whats = [what for problem, _, what, _ in found(place) if problem]
        assert any("room for 1 more checkpoint:" in what for what in whats)
        assert any("lies in memory (tmpfs)" in what for what in whats)
    finally:
        subprocess.run(["umount", place], check=True)


def test_hostile_files_are_told(healthy):
    """A file that asks for more than plain data is a problem, and its code does not run."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(healthy / "ran"),)

    torch.save({"x": Evil()}, healthy / SEED_VC.format(40))
    ((problem, subject, what, _),) = found(healthy)
    assert (problem, subject) == (True, SEED_VC.format(40))
    assert "is refused" in what
    assert not (healthy / "ran").exists()


def test_the_command_tells_it_in_80_columns(healthy, damage, seedvc_ckpt):
    """The table fits a terminal; exit codes and JSON tell programs the same."""
    well = seedvc_ckpt("doctor", healthy)
    assert (well.returncode, well.stdout) == (0, "3 checkpoints, every byte checked: no problems, 0 notes\n")
    damage(healthy / SEED_VC.format(20))
    ill = seedvc_ckpt("doctor", healthy, cwd=healthy.parent)
    assert ill.returncode == 1
    assert "problem" in ill.stdout
    assert all(len(line) <= 80 for line in ill.stdout.splitlines() if " " in line.strip())
    told = seedvc_ckpt("doctor", healthy, "--json")
    assert told.returncode == 1
    (only,) = json.loads(told.stdout)
    assert set(only) == {"problem", "subject", "what", "remedy"}
    quick = seedvc_ckpt("doctor", healthy, "--quick")
    assert (quick.returncode, "not checked byte for byte" in quick.stdout) == (0, True)
    assert seedvc_ckpt("doctor", healthy / "nowhere").returncode == 2
