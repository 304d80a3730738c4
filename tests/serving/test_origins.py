"""Which requests of web pages are taken: Host, Origin, Content-Type and CORS, on a server's checks without the server."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.event_loop import in_a_loop
from workbench.scheduler.config import ConfigError
from workbench.serving.http.origins import Access, guarded, parse_origin, same_origin
from workbench.serving.serve_settings import ServeSettings
from workbench.settings.run_settings import RunSettings

JSON = {"content-type": "application/json"}
APP = "https://app.example"


def settings(**given: Any) -> ServeSettings:
    return ServeSettings(RunSettings(), backend="simulated", **given)


def access(address: str = "127.0.0.1", **given: Any) -> Access:
    return Access.of(settings(**given), address)


def ask(
    policy: Access,
    method: str = "POST",
    headers: dict[str, str] | None = None,
    content: bytes | None = b"{}",
    refused: list[int] | None = None,
) -> httpx2.Response:
    async def answer(request: Request) -> JSONResponse:
        return JSONResponse({"body": (await request.body()).decode()})

    app = guarded(
        Starlette(routes=[Route("/x", answer, methods=["GET", "POST"])]),
        policy,
        (refused if refused is not None else []).append,
    )

    async def send() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            return await client.request(method, "/x", headers=headers, content=content)

    return in_a_loop(send())


def code(response: httpx2.Response) -> tuple[int, str | None]:
    error = response.json().get("error", {"code": None})
    assert error["code"] is None or set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"]


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        'application/json;charset="UTF-8"',
        "application/vnd.api+json",
        "application/problem+json; charset=utf-8",
        "application/json; profile=x",
    ],
)
def test_a_body_of_json_is_taken_whatever_its_kind(kind):
    assert ask(access(), headers={"content-type": kind}).json() == {"body": "{}"}


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "",
        "text/plain",
        "text/plain; application/json",
        "application/x-www-form-urlencoded",
        "text/json",
        "json",
        "multipart/form-data; boundary=x",
        "application/octet-stream",
        "application/json; charset=utf-16",
        "application/+json",
        "application/jsonp",
        "application/json, text/plain",
    ],
)
def test_a_body_that_does_not_say_that_it_is_json_is_a_415(kind):
    refused: list[int] = []
    response = ask(access(), headers={} if kind is None else {"content-type": kind}, refused=refused)
    assert code(response) == (415, "unsupported_media_type") and refused == [415]
    assert "application/json" in response.json()["error"]["message"]


def test_a_post_without_a_body_needs_no_content_type():
    assert ask(access(), content=None).is_success
    assert ask(access(), content=b"", headers={"content-type": "application/x-www-form-urlencoded"}).is_success


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://localhost:3000",
        "http://127.0.0.1:8000",
        "http://localhost",
        "https://localhost",
        "http://localhost:8000.evil.example",
        "http://localhost:99999",
        "chrome-extension://abc",
        "file://",
        "",
        "http://[::1",
        "http://[x]",
        "http://[::1]x:8000",
        "http://a:b",
    ],
)
def test_a_page_of_another_origin_may_change_nothing(origin):
    for headers, content in (({"origin": origin}, None), ({"origin": origin, **JSON}, b"{}")):
        response = ask(access(), headers=headers, content=content)
        assert code(response) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in response.headers
    assert code(ask(access(api_key="k"), headers={"origin": origin})) == (403, "origin_not_allowed")
    asked_first = {"origin": origin, "access-control-request-method": "POST"}
    assert code(ask(access(), "OPTIONS", asked_first, None)) == (403, "origin_not_allowed")
    read = ask(access(), "GET", {"origin": origin}, None)
    assert read.is_success and "access-control-allow-origin" not in read.headers, "no page can read it"


@pytest.mark.parametrize(
    ("headers", "taken"),
    [
        ({"origin": "http://localhost:8000"}, True),
        ({"origin": "http://LOCALHOST:8000"}, True),
        ({"sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "none"}, True),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
    ],
)
def test_a_page_of_the_server_itself_and_a_client_that_is_no_page_are_taken(headers, taken):
    assert ask(access(), headers={**headers, **JSON}).is_success == taken


@pytest.mark.parametrize(
    ("origin", "host", "same"),
    [
        ("http://a.example", "a.example", True),
        ("http://a.example", "a.example:80", True),
        ("https://a.example", "a.example:443", True),
        ("https://a.example", "a.example", True),
        ("http://[::1]:8000", "[::1]:8000", True),
        ("http://a.example:8000", "a.example", False),
        ("http://a.example", "b.example", False),
        ("ftp://a.example", "a.example", False),
        ("http://a.example", "x@a.example", False),
    ],
)
def test_an_origin_is_the_servers_own_when_name_and_port_are(origin, host, same):
    assert same_origin(origin, host) == same


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8000",
        "LocalHost:1",
        "127.0.0.1:8000",
        "127.8.8.8",
        "[::1]:8000",
        "[::1]",
        "a.localhost:80",
        "localhost.",
    ],
)
def test_a_server_on_the_loopback_answers_to_the_names_of_it(host):
    assert ask(access(), headers={"host": host, **JSON}).is_success


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil@localhost",
        "notlocalhost",
        "localhost/evil",
        "10.0.0.1",
        "",
        "localhost:evil",
        "[::1].evil.example",
    ],
)
def test_a_name_that_was_pointed_at_the_loopback_is_a_403_for_everything(host):
    for method in ("GET", "POST", "OPTIONS"):
        assert code(ask(access(), method, {"host": host, **JSON})) == (403, "host_not_allowed")


def test_the_name_is_checked_only_on_the_loopback_and_without_a_key():
    stranger = {"host": "box.example:8000", **JSON}
    assert not ask(access(), headers=stranger).is_success
    assert not ask(access("::1"), headers=stranger).is_success
    assert ask(access("0.0.0.0"), headers=stranger).is_success
    assert ask(access(api_key="k"), headers=stranger).is_success
    assert ask(access(allow_host=("Box.Example",)), headers=stranger).is_success
    assert ask(access(allow_host=("*",)), headers=stranger).is_success
    assert ask(access(host="box.example"), headers=stranger).is_success, "the name that it was told to listen on"


def test_an_origin_that_is_allowed_is_asked_and_answered_as_browsers_want():
    policy = access(allow_origin=(APP, "http://localhost:3000"))
    asked = ask(
        policy,
        "OPTIONS",
        {
            "origin": APP,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-stainless-lang",
            "access-control-request-private-network": "true",
        },
        None,
    )
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == APP
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert asked.headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-lang"
    assert asked.headers["access-control-allow-private-network"] == "true"
    assert "Origin" in asked.headers["vary"]
    for headers, status in (({**JSON}, 200), ({"content-type": "text/plain"}, 415)):
        answer = ask(policy, headers={"origin": APP, **headers})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == APP
        assert answer.headers["vary"] == "Origin"
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert ask(policy, "GET", {"origin": APP}, None).headers["access-control-allow-origin"] == APP
    assert code(ask(policy, headers={"origin": "https://other.example", **JSON})) == (403, "origin_not_allowed")
    assert "Origin" in ask(policy, headers=JSON).headers["vary"], "no cache gives one origin's answer to another"


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": APP, "access-control-request-method": "PUT"},
        {"origin": APP, "access-control-request-method": ""},
        {"origin": "http://localhost:8000", "access-control-request-method": "POST"},  # its own: it need not ask
    ],
)
def test_a_preflight_that_is_refused_is_an_error_like_any_other(headers):
    refused: list[int] = []
    answered = ask(access(allow_origin=(APP,)), "OPTIONS", headers, None, refused)
    assert code(answered) == (400, "preflight_refused") and refused == [400]
    assert answered.headers["content-type"] == "application/json"
    assert answered.headers.get("access-control-allow-origin") == (APP if headers["origin"] == APP else None)
    assert "Origin" in answered.headers["vary"]


def test_a_star_lets_every_page_in_and_is_noted():
    policy = access(allow_origin=("*",))
    for origin in ("https://evil.example", "null"):
        answer = ask(policy, headers={"origin": origin, **JSON})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")
    assert "every web page" in policy.notes()[0] and access().notes() == []


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("https://app.example", APP),
        ("HTTPS://App.Example:443", APP),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("http://localhost:80", "http://localhost"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
        ("*", "*"),
    ],
)
def test_an_origin_is_kept_as_browsers_write_it(given, origin):
    assert parse_origin(given) == origin


@pytest.mark.parametrize(
    "flag",
    [
        {"allow_origin": (f"{APP}/",)},
        {"allow_origin": ("app.example",)},
        {"allow_origin": ("null",)},
        {"allow_origin": ("",)},
        {"allow_origin": ("http://a:99999",)},
        {"allow_origin": ("http://u:p@a",)},
        {"allow_origin": ("https://*.example",)},
        {"allow_host": ("box:80",)},
        {"allow_host": ("http://box",)},
        {"allow_host": ("",)},
        {"allow_host": ("box",), "api_key": "k"},
    ],
)
def test_what_is_no_origin_or_name_is_refused_at_the_start_in_one_line(flag):
    with pytest.raises(ConfigError, match=rf"^{next(iter(flag))}: [^\n]+$"):
        access(**flag)
