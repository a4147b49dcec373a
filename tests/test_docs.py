"""README and docs/: alive, the same in both languages, and examples that run as they stand."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import APPID, APPSECRET, ROOT, Run, message_xml, signed
from serving import Server
from webtest import TestApp

import wechat.config
from wechat.message import from_xml
from wxsim.fake_api import FakeApi

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```.*?^```$|(?:^ {4}[^\n]*\n)+", re.MULTILINE | re.DOTALL)
each = pytest.mark.parametrize("page", PAGES)


def chinese(page: str) -> str:
    return page.replace("README.md", "README.zh-CN.md").replace("docs/", "docs/zh-CN/")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code(page: str) -> list[str]:
    """Return the fenced and the indented blocks, without their comments."""
    return [re.sub(r"(^| +)# .*$", "", block, flags=re.M) for block in BLOCK.findall(read(page))]


def python(page: str, words: str) -> str:
    """Return the Python example in which ``words`` stand."""
    blocks = re.findall(r"```python\n(.*?)```", read(page), re.DOTALL)
    return next(str(block) for block in blocks if words in block)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *map(chinese, PAGES)])
def test_every_link_leads_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", read(page))):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@each
def test_both_languages_have_the_same_code_but_for_comments(page: str) -> None:
    assert code(page) == code(chinese(page))


@each
def test_both_languages_have_the_same_names_and_figures_in_the_same_sections(page: str) -> None:
    def facts(page: str) -> list[list[str]]:
        sections = re.split(r"^## ", BLOCK.sub("", read(page)), flags=re.MULTILINE)
        return [sorted(re.findall(r"`[^`\n]+`|\d+(?:[.,]\d+)*", each)) for each in sections]

    for english, other in zip(facts(page), facts(chinese(page)), strict=True):
        assert english == other


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_a_readme_is_read_in_one_sitting(page: str) -> None:
    assert len(read(page).splitlines()) <= 200


def test_the_readme_lists_every_page() -> None:
    listed = set(re.findall(r"\| \[.*?\]\((docs/[a-z-]+\.md)\) \|", read("README.md")))
    assert listed == set(PAGES) - {"README.md"}


def test_the_first_commands_of_the_readme_do_what_it_says(run: Run, tmp_path: Path) -> None:
    server = Server(run, tmp_path, str(ROOT / "wxserver.py"), "--port", "{port}").ready()
    commands = re.findall("^python3 (-m wxsim .*?) *#", read("README.md"), re.MULTILINE)
    outputs = []
    for command in commands:
        process = run(
            *command.split(),
            *("--url", f"{server.base}/wx"),
            env={"WXSERVER_CONFIG": str(server.config)},
        )
        outputs.append(process.communicate("hi\n/image\n", timeout=20)[0].splitlines())
        assert process.returncode == 0
    assert [lines[0].partition(":")[0] for lines in outputs] == ["提交成功", "hello", "hi"]


def test_the_core_alone_serves_an_account(run: Run, tmp_path: Path) -> None:
    copied = re.search(r"The core is (.*?)\. ", read("README.md"), re.DOTALL)
    deleted = re.findall(r"^\| (`wechat/.*?) \|", read("README.md"), re.MULTILINE)
    assert copied
    for name in re.findall("`(.*?)`", copied[1]):
        (shutil.copytree if name.endswith("/") else shutil.copy)(ROOT / name, tmp_path / name)
    for name in re.findall("`(wechat/[a-z_]+.py)`", "".join(deleted[:3])):
        (tmp_path / name).unlink()
    arguments = ("-m", "gunicorn", "--chdir", str(tmp_path), "-b", "127.0.0.1:{port}", "wxserver")
    server = Server(run, tmp_path, *arguments, PYTHONPATH=str(tmp_path), WX_TOKEN="AAAAA").ready()
    assert server.ask(echostr="437512") == (200, b"437512")
    assert from_xml(server.ask(message_xml("你好"))[1])["Content"] == "你好"


def test_one_callable_serves_two_accounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def query(token: str) -> str:
        return signed(token, int(time.time()))

    for name in ("shop", "news"):
        folder = tmp_path / "accounts" / name
        folder.mkdir(parents=True)
        (folder / "config.ini").write_text(f"[wechat]\ntoken = {name}\n[server]\npath = /{name}\n")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(python("README.md", "def application"), names)
    accounts = TestApp(names["application"])
    for name in ("shop", "news"):
        assert "hello" in accounts.post(f"/{name}?{query(name)}", message_xml("hello"))
        assert (tmp_path / "accounts" / name / "state").is_dir()
    assert accounts.post(f"/news?{query('shop')}", message_xml(), status=403)
    assert accounts.get("/other", status=404)


def test_the_bot_of_the_readme_remembers_its_followers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.ini"
    config.write_text("[wechat]\ntoken = AAAAA\n")
    monkeypatch.setenv("WXSERVER_CONFIG", str(config))
    names: dict[str, Any] = {}
    exec(python("README.md", "sqlite3"), names)
    wechat.config.make_state_dir(wechat.config.load())
    answers = [names["reply"]({"FromUserName": each}) for each in ("alice", "alice", "bob")]
    assert answers == ["Message 1 from you.", "Message 2 from you.", "Message 1 from you."]


@pytest.mark.parametrize("page", ["README.md", "docs/replies.md"])
def test_the_first_reply_of_a_page_works_as_it_stands(page: str) -> None:
    names: dict[str, Any] = {}
    exec(python(page, "def reply"), names)
    assert names["reply"]({"MsgType": "text", "Content": "帮助"}) == "Ask me anything."
    click = {"MsgType": "event", "Event": "CLICK", "EventKey": "today"}
    assert names["reply"](click)["ArticleCount"] == 1


def test_the_reply_of_the_documents_tells_how_a_follower_came() -> None:
    names: dict[str, Any] = {}
    exec(python("docs/replies.md", "qrscene_"), names)

    def reply(event: str, key: str) -> object:
        return names["reply"]({"MsgType": "event", "Event": event, "EventKey": key})

    assert reply("subscribe", "qrscene_7") == reply("SCAN", "7") == "You came by the code 7."
    assert reply("subscribe", "last_trade_no_1") is reply("subscribe", "") is None


def test_the_files_of_the_documents_go_up_and_come_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_api: FakeApi
) -> None:
    config = tmp_path / "config.ini"
    account = f"[wechat]\nappid = {APPID}\nappsecret = {APPSECRET}\n"
    config.write_text(f"{account}[access_token]\napi_base = {fake_api.base}\n")
    monkeypatch.setenv("WXSERVER_CONFIG", str(config))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(b"a photo")
    (tmp_path / "pictures").mkdir()
    names: dict[str, Any] = {}
    exec(python("docs/replies.md", "upload("), names)
    sent = [names["reply"]({"MsgType": "text", "Content": "picture"}) for _ in range(2)]
    assert sent[0] == sent[1]
    media_id = sent[0]["Image"]["MediaId"]
    saved = names["reply"]({"MsgType": "image", "MediaId": media_id, "MsgId": "7"})
    assert saved == "Saved."
    assert (tmp_path / "pictures" / "7.jpg").read_bytes() == b"a photo"
