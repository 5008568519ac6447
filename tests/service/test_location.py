"""What the URL of the feature cache says, and what is told where it says nothing."""

from __future__ import annotations

import pytest

from service import settings
from service.core.errors import PropensityError
from service.location import Kind, Location, parse

SENTINELS = (("s1", 26379), ("s2", 5000))


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("redis://host", Location(Kind.SERVER, (("host", 6379),))),
        ("redis://", Location(Kind.SERVER, (("localhost", 6379),))),
        ("redis://host:1/3", Location(Kind.SERVER, (("host", 1),), database=3)),
        ("redis://[::1]:1/0", Location(Kind.SERVER, (("::1", 1),))),
        ("rediss://u:p@host", Location(Kind.SERVER, (("host", 6379),), tls=True, username="u", password="p")),
        ("redis://:a%40b%2F@host", Location(Kind.SERVER, (("host", 6379),), password="a@b/")),
        ("unix:///a%20b/c.sock", Location(Kind.SERVER, (), path="/a b/c.sock")),
        ("unix://u:p@/c.sock", Location(Kind.SERVER, (), path="/c.sock", username="u", password="p")),
        ("redis+sentinel://s1,s2:5000/shop", Location(Kind.SENTINEL, SENTINELS, service="shop")),
        (
            "rediss+sentinel://:p@s1,s2:5000/shop/2",
            Location(Kind.SENTINEL, SENTINELS, tls=True, password="p", database=2, service="shop"),
        ),
        ("redis+cluster://h1,[::1]:7001", Location(Kind.CLUSTER, (("h1", 6379), ("::1", 7001)))),
        ("rediss+cluster://h1/0", Location(Kind.CLUSTER, (("h1", 6379),), tls=True)),
    ],
)
def test_a_url_says_where_the_feature_cache_is(url: str, wanted: Location) -> None:
    assert parse(url) == wanted
    shown = wanted._replace(username=None, password=None)
    assert parse(str(shown).replace(" ", "%20")) == shown


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://localhost", "write redis://HOST:6379/0"),
        ("localhost:6379", "write redis://HOST:6379/0"),
        ("", "write redis://HOST:6379/0"),
        ("redis-sentinel://s1/shop", r"redis\+sentinel://HOST:26379,HOST:26379/NAME/0"),
        ("redis-cluster://h1", r"redis\+cluster://HOST:6379"),
        ("redis://[::1", "write redis://HOST:6379/0"),
        ("redis://h:port", "a port is a number"),
        ("redis://h:0", "a port is a number"),
        ("redis://h:65536", "a port is a number"),
        ("redis://h1:1,h2:1/0", "several hosts are Sentinels or a cluster"),
        ("redis://h/abc", "the database, at the end, is a number"),
        ("redis://h/0/1", "the database, at the end, is a number"),
        ("redis://h?db=1", "leave out what follows"),
        ("redis+sentinel://s1:26379", "the name of the master is missing"),
        ("redis+sentinel://s1/shop/x", "the database, at the end, is a number"),
        ("redis+sentinel:///shop", "a host is missing"),
        ("redis+cluster://h1,,h2", "a host is missing"),
        ("redis+cluster://h1/1", "a cluster has the database 0 alone"),
        ("unix://path/to", "three slashes"),
        ("unix://", "three slashes"),
    ],
)
def test_a_wrong_url_is_told_what_to_write(url: str, told: str) -> None:
    with pytest.raises(PropensityError, match=told) as caught:
        parse(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["redis://u:secret@h/x", "redis+cluster://u:secret@h:port", "x://u:secret@h"])
def test_a_password_is_not_repeated(url: str) -> None:
    with pytest.raises(PropensityError) as caught:
        parse(url)
    assert "secret" not in str(caught.value)


def test_a_wrong_url_in_the_settings_is_told_the_same() -> None:
    assert settings.load(redis_url="redis+sentinel://s1,s2/shop").redis_url == "redis+sentinel://s1,s2/shop"
    with pytest.raises(PropensityError, match="PROPENSITY_REDIS_URL: the name of the master is missing"):
        settings.load(redis_url="redis+sentinel://s1,s2")
