"""Identities without a broker: tickets, tokens, files, and what the registrar decides."""

import itertools
import stat
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.registrar import refusals
from services.registrar.journal import Journal
from services.registrar.refusals import EVERY_S, MAX_KINDS, Refusals
from services.registrar.state import Accounts, Admitted, State, hashed
from shared.credentials import inbox_of
from shared.errors import ConfigError, MalformedMessage, RejectError
from shared.identity import access, claims, files, keys
from shared.identity.access import Access
from shared.identity.authority import Authority, registrar_keys
from shared.identity.ticket import Ticket, parse
from shared.messages import ConnectionRefused, Enroll, InviteDevices, RevokeDevice

USER = keys.from_bytes("user", b"\x01" * 32)
ACCOUNT = keys.from_bytes("account", b"\x02" * 32)
A_SECRET, B_SECRET = "A" * 22, "B" * 22
NOW = 1_800_000_000.0


def key_of(number: int) -> str:
    return keys.from_bytes("user", bytes([number]) * 32).public


class Office:
    """A registrar's state, with facts applied as soon as they are decided."""

    def __init__(self) -> None:
        self.state = State()

    def invite(self, secret: str = A_SECRET, *, now: float = NOW, **more: object) -> None:
        request = msgspec.convert(more, InviteDevices)
        self.state.evolve(self.state.decide_invite(request, hashed(secret), now))

    def enroll(
        self, device: str, key: int, secret: str = A_SECRET, now: float = NOW
    ) -> Admitted | None:
        request = Enroll(device=device, public_key=key_of(key), secret=secret)
        fact = self.state.decide_enroll(request, now)
        if fact is not None:
            self.state.evolve(fact)
        return fact

    def revoke(self, device: str, now: float = NOW) -> None:
        fact = self.state.decide_revoke(RevokeDevice(device=device), now)
        if fact is not None:
            self.state.evolve(fact)


# ---- tickets


@given(
    st.lists(st.text(max_size=60), min_size=1, max_size=4),
    st.binary(max_size=32),
    st.text(max_size=20),
)
def test_a_ticket_survives_being_pasted(servers: list[str], pin: bytes, name: str) -> None:
    ticket = Ticket(servers, A_SECRET, pin, "seedwire", name)
    text = ticket.text()
    assert parse(f"  '{text}'\n") == ticket
    half = len(text) // 2
    assert parse(f"{text[:half]}\n  {text[half:]}") == ticket


@given(st.data())
def test_a_ticket_with_a_letter_wrong_or_missing_is_refused(data: st.DataObject) -> None:
    text = Ticket(["nats://h:4222"], A_SECRET, b"\x07" * 32).text()
    place = data.draw(st.integers(5, len(text) - 2))
    letter = data.draw(st.sampled_from("abcXYZ019-_"))
    if letter != text[place]:
        with pytest.raises(ConfigError, match="damaged"):
            parse(text[:place] + letter + text[place + 1 :])
    with pytest.raises(ConfigError, match="damaged"):
        parse(text[:place])


# ---- tokens


def test_a_token_is_the_same_for_the_same_key_and_says_nothing_of_the_seed() -> None:
    token = claims.scoped_user("till-7", USER.public, ACCOUNT, account=ACCOUNT.public, at=7)
    assert token == claims.scoped_user("till-7", USER.public, ACCOUNT, account=ACCOUNT.public, at=7)
    said = claims.decode_unverified(token)
    assert (said.sub, said.iss, said.name) == (USER.public, ACCOUNT.public, "till-7")
    assert len(token) < 700
    assert USER.seed not in token
    assert USER.seed not in repr(USER)


@pytest.mark.parametrize("text", ["", "a.b", "a.b.c", "e30.e30.x.y", "e30.WzFd.x"])
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no token"):
        claims.decode_unverified(text)


def test_answers_arrive_where_the_identity_may_listen(tmp_path: Path) -> None:
    ours, foreign = tmp_path / "ours.creds", tmp_path / "foreign.creds"
    token = claims.scoped_user("till-7", USER.public, ACCOUNT, account=ACCOUNT.public, at=7)
    ours.write_text(claims.creds_text(token, USER.seed))
    token = claims.encode({"name": "somebody", "sub": USER.public, "nats": {}}, ACCOUNT)
    foreign.write_text(claims.creds_text(token, USER.seed))
    assert (inbox_of(ours), inbox_of(foreign)) == ("_INBOX_till-7", "_INBOX")
    ours.write_text("nothing")
    with pytest.raises(ConfigError, match=r"ours\.creds is no NATS credentials file"):
        inbox_of(ours)


# ---- a fleet's keys


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_keys_are_made_once_and_are_for_one_pair_of_eyes(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "keys")
    assert authority.make(hosts=["broker.example"])
    before = contents(tmp_path)
    public = {"cert.pem", "server.conf", "operator.jwt"}
    for path in (tmp_path / "keys").rglob("*"):
        if path.is_file() and path.name not in public:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert not authority.make(hosts=["broker.example"])
    assert contents(tmp_path) == before
    (tmp_path / "keys" / "keys" / "operator.seed").unlink()  # moved to a safe
    assert not authority.make()
    seeds = [data.strip() for name, data in before.items() if name.endswith(".seed")]
    conf = authority.server_conf.read_bytes()
    assert not any(seed in conf for seed in seeds)


def test_a_lost_key_is_named_and_not_replaced(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.make()
    (tmp_path / "keys" / "role-device.seed").unlink()
    with pytest.raises(ConfigError, match=r"role-device\.seed is missing: put it back"):
        authority.make()
    (tmp_path / "registrar.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"registrar\.json: .*seedwire keys init"):
        registrar_keys(tmp_path / "registrar.json")


def test_keys_from_before_guests_had_an_account_are_completed_and_kept(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.make()
    now = registrar_keys(authority.registrar_file)
    before = contents(tmp_path)
    (tmp_path / "keys" / "guests.seed").unlink()
    old = msgspec.json.decode(before["registrar.json"])
    del old["guests"]
    authority.registrar_file.write_bytes(msgspec.json.encode(old))
    role = keys.Key(before["keys/role-outsider.seed"].decode())
    token = claims.scoped_user("outsider", USER.public, role, account=now.account, at=1)
    authority.creds("outsider").write_text(claims.creds_text(token, USER.seed))
    with pytest.raises(ConfigError, match=r"registrar\.json: .*guests.*seedwire keys init"):
        registrar_keys(authority.registrar_file)

    authority.make()
    made, after = registrar_keys(authority.registrar_file), contents(tmp_path)
    assert made.guests not in ("", now.guests)
    assert msgspec.structs.replace(made, guests=now.guests) == now
    anew = {"keys/guests.seed", "registrar.json", "server.conf", "creds/outsider.creds"}
    assert {name for name in after if after[name] != before[name]} == anew
    outsider = claims.token_of(authority.creds("outsider").read_text(), "")
    assert claims.decode_unverified(outsider).nats.issuer_account == made.guests
    authority.make()
    assert contents(tmp_path) == after


def test_an_access_file_is_found_again_from_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "fleet" / "access.toml"
    Access(["nats://h:1"], "device.creds", str(tmp_path / "ca.pem"), "seedwire").save(path)
    found = access.load(path)
    assert found.creds_file == str(path.parent / "device.creds")
    assert found.ca_file == str(tmp_path / "ca.pem")
    files.write(path, 'servers = ["a"]\ncolour = "red"\n')
    with pytest.raises(ConfigError, match="colour"):
        access.load(path)


# ---- what the registrar decides


def test_the_same_key_is_admitted_once_however_often_it_asks() -> None:
    office = Office()
    office.invite(uses=1)
    assert office.enroll("a", 1) is not None
    assert office.enroll("a", 1, now=NOW + 1e6) is None  # used up and expired, and yet
    with pytest.raises(RejectError, match="used up"):
        office.enroll("b", 2)


def test_a_name_has_one_key_and_a_key_one_name() -> None:
    office = Office()
    office.invite(uses=0)
    office.enroll("a", 1)
    with pytest.raises(RejectError, match=r"taken by another key.*device revoke a"):
        office.enroll("a", 2)
    with pytest.raises(RejectError, match="enrolled as a already"):
        office.enroll("b", 1)


def test_a_revoked_key_never_comes_back_and_its_ticket_is_closed() -> None:
    office = Office()
    office.invite(uses=0)
    office.invite(B_SECRET, uses=0)
    office.enroll("a", 1)
    office.enroll("b", 2)
    office.revoke("a", NOW + 5)
    assert office.state.revocations() == {key_of(1): int(NOW) + 5}
    assert office.state.decide_revoke(RevokeDevice(device="a"), NOW + 9) is None
    for secret in (A_SECRET, B_SECRET):
        with pytest.raises(RejectError, match="was revoked"):
            office.enroll("a", 1, secret)
    with pytest.raises(RejectError, match="closed"):
        office.enroll("a", 3)
    assert office.enroll("a", 3, B_SECRET) is not None
    assert [(one.device, one.state) for one in office.state.listed()] == [
        ("a", "enrolled"),
        ("b", "enrolled"),
    ]
    assert office.state.revocations() == {key_of(1): int(NOW) + 5}
    office.revoke("b", NOW - 1e6)  # a clock that was set back
    assert office.state.revocations()[key_of(2)] == int(NOW)


def test_an_invitation_may_be_for_one_name_and_not_for_ever() -> None:
    office = Office()
    office.invite(device="a", expires_s=60.0)
    with pytest.raises(RejectError, match="for the device a alone"):
        office.enroll("b", 1)
    with pytest.raises(RejectError, match="expired"):
        office.enroll("a", 1, now=NOW + 61)
    with pytest.raises(RejectError, match="unknown here"):
        office.enroll("a", 1, B_SECRET)
    with pytest.raises(RejectError, match="one use"):
        office.invite(B_SECRET, device="a", uses=2)


def test_each_token_of_the_account_is_newer_than_the_last_whatever_the_clock_says() -> None:
    state = State()
    times: list[int] = []
    for now in (NOW, NOW, NOW - 1e8, NOW + 0.5):
        issued = state.decide_issue(now)
        state.evolve(issued)
        times.append(issued.at)
    assert times == sorted(set(times))


# ---- its journal


def test_a_torn_line_took_no_effect_and_is_dropped(tmp_path: Path) -> None:
    first, second = (Admitted(name, key_of(1), hashed(A_SECRET), 1) for name in "ab")
    journal = Journal(tmp_path)
    journal.append(first)
    with pytest.raises(ConfigError, match="in use by another registrar"):
        Journal(tmp_path)
    journal.close()
    path = tmp_path / "identities.jsonl"
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut])
        journal = Journal(tmp_path)
        assert list(journal.facts()) == [first]
        journal.append(second)
        assert list(journal.facts()) == [first, second]
        journal.close()
    path.write_bytes(b"nonsense\n" + whole)
    journal = Journal(tmp_path)
    with pytest.raises(ConfigError, match="line 1"):
        list(journal.facts())
    journal.close()


# ---- who was refused


def test_a_stranger_who_knocks_all_day_is_told_of_once_a_minute() -> None:
    found = Refusals()
    knock = ConnectionRefused(reason="revoked", name="a")
    told = [found.take(knock, now) for now in range(50)]
    assert [one for one in told if one] == [knock]
    assert found.due(EVERY_S - 1) == []
    (summed,) = found.due(EVERY_S)
    assert summed.count == 49
    assert found.due(2 * EVERY_S) == []
    assert found.take(knock, 2 * EVERY_S) == knock  # quiet for a minute, and told of anew


def test_any_number_of_strangers_costs_bounded_room() -> None:
    found = Refusals()
    told = [
        found.take(ConnectionRefused(reason="no identity", name=f"n{number}"), 0.0)
        for number in range(10 * MAX_KINDS)
    ]
    assert sum(one is not None for one in told) == MAX_KINDS + 1
    assert sum(one.count for one in found.due(EVERY_S)) == 9 * MAX_KINDS - 1


def test_an_event_of_the_broker_is_read_and_a_strangers_words_made_plain() -> None:
    token = claims.encode({"name": "x", "sub": "U1", "exp": 5}, ACCOUNT)
    event = msgspec.json.encode({"client": {"host": "h", "name": "n", "jwt": token}})
    client, said = refusals.read(event)
    assert (client.host, said and said.sub) == ("h", "U1")
    assert refusals.read(b'{"client": {"jwt": "garbage"}}')[1] is None
    with pytest.raises(MalformedMessage):
        refusals.read(b"[]")
    assert refusals.plain("a\x1b[31m\nb" + "c" * 999) == "a?[31m?b" + "c" * 92


def test_why_somebody_was_refused_is_told_apart() -> None:
    office = Office()
    office.invite(uses=0)
    office.enroll("a", 1)
    office.enroll("b", 2)
    office.revoke("b")

    accounts = Accounts(fleet="FLEET", guests="ACC")

    def why(**said: object) -> str:
        nats = claims.Details(issuer_account=str(said.pop("account", "ACC")))
        found = msgspec.convert({"iat": 1, **said}, claims.Claims)
        return office.state.why_refused(msgspec.structs.replace(found, nats=nats), accounts, NOW)

    reasons = [
        office.state.why_refused(None, accounts, NOW),
        why(sub=key_of(1), account="FLEET"),
        why(sub=key_of(2)),
        why(sub=key_of(1)),
        why(sub=key_of(3)),
        why(sub=key_of(3), exp=NOW - 1),
        why(sub=key_of(3), account="OTHER"),
    ]
    assert all(left != right for left, right in itertools.combinations(reasons, 2))
    assert reasons[2] == "revoked"
    assert office.state.count_refused(key_of(2)) == "b"
    assert office.state.count_refused(key_of(3)) == ""
