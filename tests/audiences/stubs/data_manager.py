"""Owns a strict stand-in for Google's Data Manager API, with the package's own messages: lists, requests and members.

A request is validated as a whole, answered with its id, and worked off at once, or by `finish` while `hold` is set.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from google.ads import datamanager_v1 as api
from google.ads.datamanager_v1.types import ProcessingErrorReason
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import ServicerContext
from grpc import StatusCode as Code

from tests.audiences.stubs import googleapis
from tests.audiences.stubs.googleapis import Fault, GoogleApi, Identifier, Trailing

SCOPE: Final = "https://www.googleapis.com/auth/datamanager"
MEMBERS: Final = 10_000
IDENTIFIERS_OF_A_MEMBER: Final = 10
DESTINATIONS: Final = 10
LONGEST_STAY_DAYS: Final = 540
KEPT_DAYS: Final = 50  # that the state of a request can be asked
DAY_S: Final = 86_400
HASHED: Final = ("email_address", "phone_number")
REASON: Final = "PROCESSING_ERROR_REASON_"
RETRIEVE: Final = "RetrieveRequestStatus"
QUOTAS: Final = {  # by method; the others are IngestionMutateRequests
    RETRIEVE: "IngestionReadRequestsPerMinutePerProject",
    "ListUserLists": "ManagementReadRequestsPerMinutePerProject",
    "CreateUserList": "ManagementMutateRequestsPerMinutePerProject",
}
STATUS: Final = api.RequestStatusPerDestination.RequestStatus
ADS: Final = api.ProductAccount.AccountType.GOOGLE_ADS
GRANTED: Final = api.ConsentStatus.CONSENT_GRANTED

Violation = tuple[str, str, str]  # field, reason, description


class Wrong(googleapis.Wrong):
    """A status of google.rpc with its details, as gRPC carries it."""

    def __init__(
        self,
        code: Code,
        reason: str,
        message: str = "There was a problem with the request.",
        violations: Sequence[Violation] = (),
        delay_s: float = 0,
        quota: str = "",
    ) -> None:
        super().__init__(code, message)
        metadata = {"quota_limit": quota} if quota else {}
        self.details: list[Any] = [
            error_details_pb2.ErrorInfo(reason=reason, domain="datamanager.googleapis.com", metadata=metadata)
        ]
        if violations:
            named = [
                error_details_pb2.BadRequest.FieldViolation(field=where, reason=why, description=said)
                for where, why, said in violations
            ]
            self.details.append(error_details_pb2.BadRequest(field_violations=named))
        if delay_s:
            delay = duration_pb2.Duration(seconds=int(delay_s), nanos=round(delay_s % 1 * 1e9))
            self.details.append(error_details_pb2.RetryInfo(retry_delay=delay))

    def trailing(self, request_id: str) -> Trailing:
        status = status_pb2.Status(code=self.code.value[0], message=str(self))
        for detail in [*self.details, error_details_pb2.RequestInfo(request_id=request_id)]:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return [("grpc-status-details-bin", status.SerializeToString())]


@dataclass
class RequestState:
    """A request that was taken."""

    number: int
    list_id: str
    removing: bool
    people: list[list[Identifier]]
    day: float
    status: int = STATUS.PROCESSING
    wrong: dict[str, int] = field(default_factory=dict)  # members that were not taken, by reason

    @property
    def id(self) -> str:
        return id_of(self.number)


def id_of(number: int) -> str:
    """The id of the request of a number."""
    return str(uuid.UUID(int=number))


class DataManagerStub(GoogleApi):
    """One account of Google Ads behind a manager account."""

    package = "google.ads.datamanager.v1"
    client = "gapic/"

    def __init__(self) -> None:
        super().__init__()
        self.lists: dict[str, Any] = {}  # by number, as text
        self.requests: dict[str, RequestState] = {}
        self.refuse: set[str] = set()  # hashes whose member does not pass the validation
        self.refuse_as = "INVALID_AUDIENCE_MEMBER"
        self.violations_told = 1000  # of a request
        self.miss: dict[str, str] = {}  # hashes whose member is not taken when the request is worked off, and why

    # --- what tests do ---

    def names(self) -> Mapping[str, str]:
        return {one.display_name: number for number, one in self.lists.items()}

    def running(self) -> list[int]:
        """The numbers of requests that are under way."""
        return [one.number for one in self.requests.values() if one.status == STATUS.PROCESSING]

    def finish(self, fail: str | None = None, jobs: Collection[int] | None = None, share: float = 0) -> None:
        """Work off requests under way, all or those; with `fail` each fails, for that reason, having done a share."""
        with self._lock:
            for one in self.requests.values():
                if one.status == STATUS.PROCESSING and (jobs is None or one.number in jobs):
                    self._work_off(one, fail, share)

    def stay_days(self, name: str) -> float:
        return float(self.lists[name].membership_duration.days)

    def put(
        self, name: str, days: float = LONGEST_STAY_DAYS, keys: Sequence[str] = ("CONTACT_ID",), **more: Any
    ) -> str:
        """A list that is there already; its number."""
        with self._lock:
            number = str(1000 + len(self.lists))
            self.lists[number] = api.UserList(
                name=f"{self.account}/userLists/{number}",
                id=int(number),
                display_name=name,
                membership_duration=duration_pb2.Duration(seconds=round(days * DAY_S)),
                ingested_user_list_info={"upload_key_types": list(keys)},
                **{"membership_status": "OPEN", "access_reason": "OWNED", **more},
            )
            self.members[number] = set()
            return number

    @property
    def account(self) -> str:
        return f"accountTypes/GOOGLE_ADS/accounts/{self.customer_id}"

    # --- rules ---

    def _break(self, code: Code, reason: str, message: str) -> NoReturn:
        self.broken.append(f"{reason}: {message}")
        raise Wrong(code, reason, message)

    def _refuse_field(self, where: str, reason: str, message: str = "") -> NoReturn:
        self.broken.append(f"{reason}: {message or where}")
        raise Wrong(Code.INVALID_ARGUMENT, "INVALID_ARGUMENT", violations=[(where, reason, message)])

    def admit(self, method: str, context: ServicerContext) -> None:
        super().admit(method, context)
        metadata = dict(context.invocation_metadata())
        token = self.token_of(context)
        if token is None:
            self._break(Code.UNAUTHENTICATED, "UNAUTHENTICATED", method)
        if SCOPE not in self.scopes[token].split():
            self._break(Code.PERMISSION_DENIED, "ACCESS_TOKEN_SCOPE_INSUFFICIENT", method)
        if method in ("ListUserLists", "CreateUserList"):
            if metadata.get("login-account") != f"accountTypes/GOOGLE_ADS/accounts/{self.login_customer_id}":
                self._break(Code.PERMISSION_DENIED, "PERMISSION_DENIED", f"{method} through no manager")
            if "parent=" not in str(metadata.get("x-goog-request-params", "")):
                self.broken.append(f"{method}: without the header that routes it")
        elif "login-account" in metadata:
            self.broken.append(f"{method}: takes no header, since the destinations say through whom")
        quota = QUOTAS.get(method, "IngestionMutateRequestsPerMinutePerProject")
        if self.is_too_many(method, quota):
            raise Wrong(Code.RESOURCE_EXHAUSTED, "RESOURCE_EXHAUSTED", "Too many requests.", quota=quota)

    def wrong_of(self, fault: Fault) -> googleapis.Wrong:
        if not fault.name:
            return googleapis.Wrong(fault.code, "a fault of the test's")
        return Wrong(fault.code, fault.name, "A fault of the test's.", delay_s=fault.delay_s)

    # --- UserListService ---

    def list_user_lists(self, request: Any) -> Any:
        self._parent(request.parent)
        if request.page_size > 1000:
            self._refuse_field("page_size", "INVALID_ARGUMENT")
        found = list(self.lists.values())
        if request.filter:
            match = re.fullmatch(r'display_name = "((?:[^"\\]|\\.)*)"', request.filter)
            if not match:
                self._refuse_field("filter", "INVALID_FILTER", request.filter)
            wanted = re.sub(r"\\(.)", r"\1", match[1])
            found = [one for one in found if one.display_name == wanted]
        start, size = int(request.page_token or 0), min(request.page_size or 50, self.page)
        more = str(start + size) if start + size < len(found) else ""
        return api.ListUserListsResponse(user_lists=found[start : start + size], next_page_token=more)

    def create_user_list(self, request: Any) -> Any:
        self._parent(request.parent)
        wanted = request.user_list
        for name in ("display_name", "description"):
            if not getattr(wanted, name):
                self._refuse_field(f"user_list.{name}", "REQUIRED_FIELD_MISSING")
        seconds = type(wanted).pb(wanted).membership_duration.seconds
        if seconds % DAY_S:
            self._refuse_field("user_list.membership_duration", "INVALID_ARGUMENT", "no whole days")
        if seconds > LONGEST_STAY_DAYS * DAY_S:
            self._refuse_field("user_list.membership_duration", "MEMBERSHIP_DURATION_TOO_LONG")
        info = wanted.ingested_user_list_info
        if [one.name for one in info.upload_key_types] != ["CONTACT_ID"]:
            self._refuse_field("user_list.ingested_user_list_info", "UNSUPPORTED_USER_LIST_UPLOAD_KEY_TYPES")
        if not info.contact_id_info.data_source_type:
            self._refuse_field("user_list.ingested_user_list_info.contact_id_info", "REQUIRED_FIELD_MISSING")
        if any(one.display_name == wanted.display_name for one in self.lists.values()):  # two may at a time: no rule
            where = "user_list.display_name"
            raise Wrong(
                Code.INVALID_ARGUMENT, "INVALID_ARGUMENT", violations=[(where, "DISPLAY_NAME_ALREADY_USED", "")]
            )
        return self.lists[self.put(wanted.display_name, seconds / DAY_S or LONGEST_STAY_DAYS)]

    def _parent(self, parent: str) -> None:
        if not re.fullmatch(r"accountTypes/GOOGLE_ADS/accounts/\d+", parent):
            self._refuse_field("parent", "INVALID_RESOURCE_NAME", parent)
        if parent != self.account:
            self._break(Code.PERMISSION_DENIED, "PERMISSION_DENIED", parent)

    # --- IngestionService ---

    def ingest_audience_members(self, request: Any) -> Any:
        raw = type(request).pb(request)
        if raw.terms_of_service.customer_match_terms_of_service_status != api.TermsOfServiceStatus.ACCEPTED:
            self._refuse_field("terms_of_service", "TERMS_AND_CONDITIONS_NOT_SIGNED")
        members = [raw, *(one for one in raw.audience_members if one.HasField("consent"))]
        if any((one.consent.ad_user_data, one.consent.ad_personalization) != (GRANTED, GRANTED) for one in members):
            self.broken.append("DENIED_CONSENT: members without consent")
            return api.IngestAudienceMembersResponse(request_id=self._taken(raw, removing=False, fail="DENIED_CONSENT"))
        return api.IngestAudienceMembersResponse(request_id=self._taken(raw, removing=False))

    def remove_audience_members(self, request: Any) -> Any:
        raw = type(request).pb(request)
        return api.RemoveAudienceMembersResponse(request_id=self._taken(raw, removing=True))

    def retrieve_request_status(self, request: Any) -> Any:
        state = self.requests.get(request.request_id)
        if state is None:
            raise Wrong(Code.INVALID_ARGUMENT, "INVALID_REQUEST_ID", "The request ID is not valid.")
        if self.day - state.day > KEPT_DAYS:
            raise Wrong(Code.INVALID_ARGUMENT, "REQUEST_TOO_OLD", "The request is too old.")
        counts = {"record_count": len(state.people)}
        kind = "removal" if state.removing else "ingestion"
        status = api.RequestStatusPerDestination(
            {
                "destination": self._destination(state.list_id),
                "request_status": state.status,
                f"audience_members_{kind}_status": {f"composite_data_{kind}_status": counts},
            }
        )
        if state.status in (STATUS.FAILED, STATUS.PARTIAL_SUCCESS):
            status.error_info = api.ErrorInfo(
                error_counts=[
                    {"reason": getattr(ProcessingErrorReason, REASON + why), "record_count": count}
                    for why, count in state.wrong.items()
                ]
            )
        return api.RetrieveRequestStatusResponse(request_status_per_destination=[status])

    def _destination(self, list_id: str) -> Any:
        account = {"account_type": ADS, "account_id": self.customer_id}
        through = {"account_type": ADS, "account_id": self.login_customer_id}
        return api.Destination(operating_account=account, login_account=through, product_destination_id=list_id)

    def _taken(self, raw: Any, removing: bool, fail: str | None = None) -> str:
        """Validate a request as a whole, and take it; its id."""
        list_id = self._list_of(raw)
        if raw.encoding not in (api.Encoding.HEX, api.Encoding.BASE64):
            self._refuse_field("encoding", "REQUIRED_FIELD_MISSING")
        if raw.HasField("encryption_info"):
            self._refuse_field("encryption_info", "INVALID_ARGUMENT", "nothing is encrypted here")
        if not raw.audience_members:
            self._refuse_field("audience_members", "REQUIRED_FIELD_MISSING")
        if len(raw.audience_members) > MEMBERS:
            self._refuse_field("audience_members", "TOO_MANY_AUDIENCE_MEMBERS", f"{len(raw.audience_members)} members")
        people: list[list[Identifier]] = []
        violations: list[Violation] = []
        for place, member in enumerate(raw.audience_members):
            where = f"audience_members.audience_members[{place}]"
            identifiers = self._identifiers(member, where)
            people.append(identifiers)
            if any(value in self.refuse for _, value in identifiers):
                violations.append((f"{where}.composite_data", self.refuse_as, "The audience member is not valid."))
        if violations:
            told = violations[: self.violations_told]
            raise Wrong(Code.INVALID_ARGUMENT, "INVALID_ARGUMENT", violations=told)
        state = RequestState(5000 + len(self.requests), list_id, removing, people, self.day)
        if raw.validate_only:
            return ""
        self.requests[state.id] = state
        if not self.hold:
            self._work_off(state, fail, 0)
        return state.id

    def _list_of(self, raw: Any) -> str:
        if not 1 <= len(raw.destinations) <= DESTINATIONS:
            self._refuse_field(
                "destinations", "TOO_MANY_DESTINATIONS" if raw.destinations else "REQUIRED_FIELD_MISSING"
            )
        (one,) = raw.destinations  # others are not needed here
        account = one.operating_account
        if account.product or account.account_type != ADS or not account.account_id.isdigit():
            self._refuse_field("destinations[0].operating_account", "INVALID_DESTINATION", str(account))
        if account.account_id != self.customer_id or (
            (one.login_account.account_type, one.login_account.account_id) != (ADS, self.login_customer_id)
        ):
            self._break(Code.PERMISSION_DENIED, "PERMISSION_DENIED", str(one))
        found = self.lists.get(one.product_destination_id)
        if found is None:
            self._refuse_field("destinations[0].product_destination_id", "INVALID_USER_LIST_ID", str(one))
        if [key.name for key in found.ingested_user_list_info.upload_key_types] != ["CONTACT_ID"]:
            self._refuse_field("destinations[0].product_destination_id", "INVALID_USER_LIST_TYPE", str(one))
        return str(one.product_destination_id)

    def _identifiers(self, member: Any, where: str) -> list[Identifier]:
        """The identifiers of a member. Raises Wrong where they break a rule."""
        if member.WhichOneof("data") != "composite_data" or member.composite_data.ip_data:
            self._refuse_field(where, "INVALID_AUDIENCE_MEMBER", "no contact in composite data")
        given = member.composite_data.user_data.user_identifiers
        if not given:
            self._refuse_field(where, "REQUIRED_FIELD_MISSING", "no identifier")
        if len(given) > IDENTIFIERS_OF_A_MEMBER:
            self._refuse_field(where, "TOO_MANY_USER_IDENTIFIERS", f"{len(given)} identifiers")
        identifiers: list[Identifier] = []
        for one in given:
            kind = one.WhichOneof("identifier")
            if kind not in HASHED:
                self._refuse_field(f"{where}.user_identifiers", "INVALID_AUDIENCE_MEMBER", str(kind))
            value = str(getattr(one, kind))
            if not re.fullmatch("[0-9a-fA-F]*", value):
                self._refuse_field(f"{where}.user_identifiers", "INVALID_HEX_ENCODING", "is not hex encoded")
            if len(value) != 64:
                self._refuse_field(where, "INVALID_SHA256_FORMAT")
            identifiers.append((kind, value.lower()))
        return identifiers

    def _work_off(self, state: RequestState, fail: str | None, share: float) -> None:
        missed = {place: why for place, one in enumerate(state.people) for _, value in one for why in self._why(value)}
        if fail:
            kept = round(len(state.people) * share)
            missed = dict.fromkeys(range(kept, len(state.people)), fail) or {0: fail}
            state.status = STATUS.FAILED
        else:
            state.status = STATUS.PARTIAL_SUCCESS if missed else STATUS.SUCCESS
            if len(missed) == len(state.people):
                state.status = STATUS.FAILED
        for why in missed.values():
            state.wrong[why] = state.wrong.get(why, 0) + 1
        done = [one for place, one in enumerate(state.people) if place not in missed]
        self.change(state.list_id, state.removing, done)

    def _why(self, value: str) -> list[str]:
        return [self.miss[value]] if value in self.miss else []

    # --- serving ---

    def methods(self) -> Mapping[str, Mapping[str, tuple[Callable[[Any], Any], type[Any]]]]:
        return {
            "UserListService": {
                "ListUserLists": (self.list_user_lists, api.ListUserListsRequest),
                "CreateUserList": (self.create_user_list, api.CreateUserListRequest),
            },
            "IngestionService": {
                "IngestAudienceMembers": (self.ingest_audience_members, api.IngestAudienceMembersRequest),
                "RemoveAudienceMembers": (self.remove_audience_members, api.RemoveAudienceMembersRequest),
                RETRIEVE: (self.retrieve_request_status, api.RetrieveRequestStatusRequest),
            },
        }
