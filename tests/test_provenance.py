"""What a study notes of the folder that it is started in: the commit, by a git that runs no program of the folder's."""

import os
import shutil
import subprocess

import pytest

from fnn.study import provenance

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="no git is installed")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit, in which this process is."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "repository"
    folder.mkdir()
    monkeypatch.chdir(folder)
    git("init", "--quiet")
    (folder / "a.txt").write_text("one\n")
    git("add", ".")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "-m", "first")
    return folder


def git(*arguments):
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_and_whether_tracked_files_differ(repository):
    commit = git("rev-parse", "HEAD")
    assert provenance._commit() == commit
    (repository / "new.txt").touch()
    assert provenance._commit() == commit  # not tracked
    (repository / "a.txt").write_text("two\n")
    assert provenance._commit() == f"{commit}-dirty"
    git("add", "a.txt")
    assert provenance._commit() == f"{commit}-dirty"
    (repository / "below").mkdir()
    os.chdir(repository / "below")
    assert provenance._commit() == f"{commit}-dirty"
    git("worktree", "add", "--quiet", "../../linked")
    os.chdir(repository.parent / "linked")
    assert provenance._commit() == commit


def test_no_repository_and_no_commit(tmp_path, repository, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance._commit() is None
    git("init", "--quiet", "empty")
    monkeypatch.chdir(tmp_path / "empty")
    assert provenance._commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance._commit() is None


def test_no_program_that_a_repository_names_is_run(repository, tmp_path):
    """Monitors, filters under hard names, hooks, diff and merge drivers, pagers: all would leave a file."""
    mark = tmp_path / "ran"
    evil = tmp_path / "evil"
    evil.write_text(f"#!/bin/sh\ntouch {mark}\ncat\n")
    evil.chmod(0o755)
    names = (
        *("core.fsmonitor", "core.pager", "core.editor", "core.sshCommand", "core.gitProxy", "core.askPass"),
        *("diff.external", "diff.x.command", "diff.x.textconv", "merge.x.driver", "gpg.program", "pager.status"),
        *("filter.x.clean", "filter.x.smudge", "filter.x.process", "filter.a=b.clean", "alias.rev-parse", "alias.status"),
        *("remote.origin.uploadpack", "core.alternateRefsCommand", "credential.helper", "sequence.editor"),
    )  # fmt: skip
    for name in names:
        git("config", name, str(evil))
    git("config", "core.hooksPath", str(tmp_path / "hooks"))
    for folder in (tmp_path / "hooks", repository / ".git" / "hooks"):
        folder.mkdir(exist_ok=True)
        for hook in (
            "post-index-change",
            "post-checkout",
            "fsmonitor-watchman",
            "query-watchman",
            "reference-transaction",
        ):
            shutil.copy(evil, folder / hook)
    attributes = "*.txt filter=x diff=x merge=x\n"
    (repository / ".gitattributes").write_text(attributes)
    (repository / ".git" / "info").mkdir(exist_ok=True)
    (repository / ".git" / "info" / "attributes").write_text(attributes + "*.txt filter=a=b\n")
    mark.unlink(missing_ok=True)  # `git config` may have asked for a pager
    for content in ("one\n", "two\n"):  # both with another time than the index has, so that git must look inside
        (repository / "a.txt").write_text(content)
        os.utime(repository / "a.txt", (1, 1))
        assert provenance._commit().endswith("-dirty") == (content == "two\n")
        assert not mark.exists(), content
