"""Owns a strict stand-in for Google Ads, with the package's own messages: it holds lists, jobs and members."""

from __future__ import annotations

import datetime as dt
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import grpc
from google.ads.googleads.v26.enums.types.consent_status import ConsentStatusEnum
from google.ads.googleads.v26.enums.types.customer_match_upload_key_type import CustomerMatchUploadKeyTypeEnum
from google.ads.googleads.v26.enums.types.offline_user_data_job_failure_reason import (
    OfflineUserDataJobFailureReasonEnum,
)
from google.ads.googleads.v26.enums.types.offline_user_data_job_status import OfflineUserDataJobStatusEnum
from google.ads.googleads.v26.enums.types.offline_user_data_job_type import OfflineUserDataJobTypeEnum
from google.ads.googleads.v26.enums.types.user_list_membership_status import UserListMembershipStatusEnum
from google.ads.googleads.v26.enums.types.user_list_type import UserListTypeEnum
from google.ads.googleads.v26.errors.types.errors import ErrorLocation, GoogleAdsError, GoogleAdsFailure
from google.ads.googleads.v26.resources.types.customer import Customer
from google.ads.googleads.v26.resources.types.offline_user_data_job import OfflineUserDataJob
from google.ads.googleads.v26.resources.types.user_list import UserList
from google.ads.googleads.v26.services.types import (
    google_ads_service,
    offline_user_data_job_service,
    user_list_service,
)
from google.longrunning import operations_pb2
from google.protobuf import any_pb2
from google.rpc import status_pb2
from pydantic import SecretStr

from tests.audiences.stubs import googleapis
from tests.audiences.stubs.googleapis import Fault, GoogleApi, Identifier, Trailing

FAILURE: Final = "google.ads.googleads.v26.errors.googleadsfailure-bin"
MEMBERS: Final = 10_000
IDENTIFIERS_OF_A_REQUEST: Final = 100_000
IDENTIFIERS_OF_AN_OPERATION: Final = 20
HASHED: Final = ("hashed_email", "hashed_phone_number")
STATUS: Final = OfflineUserDataJobStatusEnum.OfflineUserDataJobStatus
REASON: Final = OfflineUserDataJobFailureReasonEnum.OfflineUserDataJobFailureReason
GRANTED: Final = ConsentStatusEnum.ConsentStatus.GRANTED
DENIED: Final = ConsentStatusEnum.ConsentStatus.DENIED
RESOURCES: Final[Mapping[str, type[Any]]] = {
    "customer": Customer,
    "user_list": UserList,
    "offline_user_data_job": OfflineUserDataJob,
}


class Wrong(googleapis.Wrong):
    """An error of Google Ads."""

    def __init__(self, code: grpc.StatusCode, kind: str, name: str, message: str = "", delay_s: float = 0) -> None:
        super().__init__(code, f"{kind}.{name}: {message}")
        self.error = error_of(kind, name, message, delay_s)

    def trailing(self, request_id: str) -> Trailing:
        failure = GoogleAdsFailure(errors=[self.error], request_id=request_id)
        return [(FAILURE, GoogleAdsFailure.serialize(failure))]


def error_of(kind: str, name: str, message: str = "", delay_s: float = 0, path: Sequence[Any] = ()) -> GoogleAdsError:
    error = GoogleAdsError(message=message or name.replace("_", " ").lower())
    setattr(error.error_code, kind, name)
    if delay_s:
        error.details.quota_error_details.retry_delay = dt.timedelta(seconds=delay_s)
    for step in path:
        name, index = step if isinstance(step, tuple) else (step, None)
        element = ErrorLocation.FieldPathElement(field_name=name)
        if index is not None:
            element.index = index
        error.location.field_path_elements.append(element)
    return error


@dataclass
class JobState:
    number: int
    list_id: str
    consent: tuple[int, int]
    external_id: int
    status: int = STATUS.PENDING
    reason: int = REASON.UNSPECIFIED
    removing: bool | None = None
    operations: list[list[Identifier]] = field(default_factory=list)


class GoogleStub(GoogleApi):
    """One account. Everything that a test may look at or set is an attribute."""

    package = "google.ads.googleads.v26.services"
    client = "gccl/"

    def __init__(self) -> None:
        super().__init__()
        self.developer_token = "developer-" + secrets.token_hex(8)
        self.lists: dict[str, UserList] = {}
        self.jobs: dict[str, JobState] = {}
        self.refuse: set[str] = set()  # hashes whose operation fails
        self.refuse_as = ("offline_user_data_job_error", "MISSING_USER_IDENTIFIER")

    # --- what tests do ---

    @property
    def options(self) -> dict[str, Any]:
        return super().options | {"developer_token": SecretStr(self.developer_token)}

    def stay_days(self, name: str) -> float:
        return float(self.lists[name].membership_life_span)

    def names(self) -> Mapping[str, str]:
        return {one.name: key for key, one in self.lists.items()}

    def running(self) -> list[int]:
        """The numbers of jobs that run."""
        return [job.number for job in self.jobs.values() if job.status == STATUS.RUNNING]

    def finish(self, fail: str | None = None, jobs: Collection[int] | None = None, share: float = 0) -> None:
        """Work off jobs that run, all or those; with `fail` each fails, for that reason, having done a share of it."""
        with self._lock:
            for job in self.jobs.values():
                if job.status == STATUS.RUNNING and (jobs is None or job.number in jobs):
                    self._work_off(job, fail, share)

    def put(self, name: str, days: int = 540, **changes: Any) -> str:
        """A list that is there already."""
        with self._lock:
            number = 1000 + len(self.lists)
            resource = f"customers/{self.customer_id}/userLists/{number}"
            made = UserList(
                resource_name=resource,
                id=number,
                name=name,
                type_=UserListTypeEnum.UserListType.CRM_BASED,
                membership_status=UserListMembershipStatusEnum.UserListMembershipStatus.OPEN,
                membership_life_span=days,
                crm_based_user_list={"upload_key_type": "CONTACT_INFO"},
            )
            for key, value in changes.items():
                setattr(made, key, value)
            self.lists[resource] = made
            self.members[resource] = set()
            return resource

    # --- rules ---

    def _break(self, code: grpc.StatusCode, kind: str, name: str, message: str) -> NoReturn:
        self.broken.append(f"{kind}.{name}: {message}")
        raise Wrong(code, kind, name, message)

    def _refuse_request(self, kind: str, name: str, message: str) -> NoReturn:
        self._break(grpc.StatusCode.INVALID_ARGUMENT, kind, name, message)

    def admit(self, method: str, context: grpc.ServicerContext) -> None:
        super().admit(method, context)
        metadata = dict(context.invocation_metadata())
        if self.token_of(context) is None:
            self._break(grpc.StatusCode.UNAUTHENTICATED, "authentication_error", "OAUTH_TOKEN_INVALID", method)
        if metadata.get("developer-token") != self.developer_token:
            self._break(grpc.StatusCode.UNAUTHENTICATED, "authentication_error", "DEVELOPER_TOKEN_INVALID", method)
        if metadata.get("login-customer-id") != self.login_customer_id:
            self._break(grpc.StatusCode.PERMISSION_DENIED, "authorization_error", "USER_PERMISSION_DENIED", method)
        if self.is_too_many(method):
            raise Wrong(grpc.StatusCode.RESOURCE_EXHAUSTED, "quota_error", "RESOURCE_TEMPORARILY_EXHAUSTED", delay_s=30)

    def wrong_of(self, fault: Fault) -> googleapis.Wrong:
        if fault.kind is None:
            return googleapis.Wrong(fault.code, "a fault of the test's")
        return Wrong(fault.code, fault.kind, fault.name, delay_s=fault.delay_s)

    def _account(self, customer_id: str) -> None:
        if customer_id != self.customer_id:
            self._break(
                grpc.StatusCode.PERMISSION_DENIED, "authorization_error", "USER_PERMISSION_DENIED", str(customer_id)
            )

    # --- UserListService ---

    def mutate_user_lists(self, request: Any) -> Any:
        self._account(request.customer_id)
        response = user_list_service.MutateUserListsResponse()
        for operation in request.operations:
            if operation._pb.WhichOneof("operation") != "create":
                self._refuse_request("user_list_error", "USER_LIST_MUTATE_NOT_SUPPORTED", "only lists are made here")
            wanted = operation.create
            if not wanted.name:
                self._refuse_request("user_list_error", "INVALID_NAME", "a list without a name")
            if wanted._pb.WhichOneof("user_list") != "crm_based_user_list":
                self._refuse_request("user_list_error", "CONCRETE_TYPE_REQUIRED", "a list of no type")
            contact = CustomerMatchUploadKeyTypeEnum.CustomerMatchUploadKeyType.CONTACT_INFO
            if wanted.crm_based_user_list.upload_key_type != contact:
                self._refuse_request("user_list_error", "INVALID_TYPE", "a list of another upload key type")
            if not 0 <= wanted.membership_life_span <= 540:
                self._refuse_request("range_error", "TOO_HIGH", f"{wanted.membership_life_span} days of membership")
            if any(one.name == wanted.name for one in self.lists.values()):  # two may make one at a time: no rule
                raise Wrong(grpc.StatusCode.INVALID_ARGUMENT, "user_list_error", "NAME_ALREADY_USED")
            resource = self.put(wanted.name, wanted.membership_life_span)
            response.results.append(user_list_service.MutateUserListResult(resource_name=resource))
        return response

    # --- OfflineUserDataJobService ---

    def create_offline_user_data_job(self, request: Any) -> Any:
        self._account(request.customer_id)
        job = request.job
        if job.type_ != OfflineUserDataJobTypeEnum.OfflineUserDataJobType.CUSTOMER_MATCH_USER_LIST:
            self._refuse_request("request_error", "REQUIRED_FIELD_MISSING", "a job of another type")
        metadata = job.customer_match_user_list_metadata
        if metadata.user_list not in self.lists:
            self._refuse_request("offline_user_data_job_error", "INVALID_USER_LIST_ID", str(metadata.user_list))
        if DENIED in (metadata.consent.ad_user_data, metadata.consent.ad_personalization):
            self._refuse_request(
                "offline_user_data_job_error", "CUSTOMER_NOT_ACCEPTED_CUSTOMER_DATA_TERMS", "consent is denied"
            )
        if any(job.external_id and one.external_id == job.external_id for one in self.jobs.values()):
            self._refuse_request(
                "offline_user_data_job_error", "EXTERNAL_UPDATE_ID_ALREADY_EXISTS", str(job.external_id)
            )
        number = 5000 + len(self.jobs)
        resource = f"customers/{self.customer_id}/offlineUserDataJobs/{number}"
        consent = (metadata.consent.ad_user_data, metadata.consent.ad_personalization)
        self.jobs[resource] = JobState(number, metadata.user_list, consent, job.external_id)
        return offline_user_data_job_service.CreateOfflineUserDataJobResponse(resource_name=resource)

    def _job(self, resource: str) -> JobState:
        if resource not in self.jobs:
            self._refuse_request("request_error", "RESOURCE_NOT_FOUND", f"no job {resource}")
        return self.jobs[resource]

    def add_offline_user_data_job_operations(self, request: Any) -> Any:
        job = self._job(request.resource_name)
        kind = "offline_user_data_job_error"
        if job.status != STATUS.PENDING:
            self._refuse_request(kind, "JOB_ALREADY_STARTED", request.resource_name)
        if not request.operations:
            self._refuse_request("collection_size_error", "TOO_FEW", "a request without operations")
        if len(request.operations) > MEMBERS:
            self._refuse_request("collection_size_error", "TOO_MANY", f"{len(request.operations)} operations")
        raw = type(request).pb(request).operations  # ten times faster to go through
        count = sum(len((one.remove if one.HasField("remove") else one.create).user_identifiers) for one in raw)
        if count > IDENTIFIERS_OF_A_REQUEST:
            self._refuse_request(kind, "TOO_MANY_USER_IDENTIFIERS", f"{count} identifiers in a request")
        errors = []
        for place, operation in enumerate(raw):
            removing = operation.HasField("remove")
            if operation.remove_all:
                self._refuse_request(kind, "INVALID_OPERATION_ORDER", "a list is emptied")
            if job.removing is None:
                job.removing = removing
            if job.removing != removing:
                self._refuse_request(kind, "CONFLICTING_OPERATION", "creation and removal in one job")
            if not removing and job.consent != (GRANTED, GRANTED):
                self._refuse_request(kind, "CUSTOMER_NOT_ACCEPTED_CUSTOMER_DATA_TERMS", "members without consent")
            data = operation.remove if removing else operation.create
            wrong = self._wrong_operation(data, place, "remove" if removing else "create")
            if wrong is None:
                identifiers = [(one.WhichOneof("identifier"), self._value(one)) for one in data.user_identifiers]
                job.operations.append(identifiers)
            else:
                errors.append(wrong)
        response = offline_user_data_job_service.AddOfflineUserDataJobOperationsResponse()
        if errors and not request.enable_partial_failure:
            raise Wrong(grpc.StatusCode.INVALID_ARGUMENT, *self.refuse_as)
        if errors:
            detail = any_pb2.Any()
            failure = GoogleAdsFailure.pb(GoogleAdsFailure(errors=errors, request_id="partial"))
            detail.Pack(failure)
            status = status_pb2.Status(code=3, message="Multiple errors in ‘details’.", details=[detail])
            type(response).pb(response).partial_failure_error.CopyFrom(status)
        return response

    @staticmethod
    def _value(identifier: Any) -> str:
        return str(getattr(identifier, identifier.WhichOneof("identifier")))

    def _wrong_operation(self, data: Any, place: int, how: str) -> GoogleAdsError | None:
        """What Google finds wrong with one operation: a broken rule, or what the test wants it to refuse."""
        kind = "offline_user_data_job_error"
        path: list[Any] = [("operations", place), how]

        def broken(name: str, *where: Any) -> GoogleAdsError:
            self.broken.append(f"{kind}.{name}: operation {place}")
            return error_of(kind, name, path=[*path, *where])

        if not data.user_identifiers:
            return broken("MISSING_USER_IDENTIFIER")
        if len(data.user_identifiers) > IDENTIFIERS_OF_AN_OPERATION:
            return broken("TOO_MANY_USER_IDENTIFIERS")
        if data.HasField("consent"):
            return broken("OPERATION_LEVEL_CONSENT_PROVIDED")
        if data.HasField("user_attribute"):
            return broken("ATTRIBUTES_NOT_APPLICABLE_FOR_CUSTOMER_MATCH_USER_LIST")
        for index, one in enumerate(data.user_identifiers):
            which = one.WhichOneof("identifier")
            if which not in HASHED:
                return broken("INCOMPATIBLE_UPLOAD_KEY_TYPE", ("user_identifiers", index))
            if not re.fullmatch("[0-9a-f]{64}", self._value(one)):
                return broken("INVALID_SHA256_FORMAT", ("user_identifiers", index), which)
            if self._value(one) in self.refuse:
                return error_of(*self.refuse_as, path=[*path, ("user_identifiers", index), which])
        return None

    def run_offline_user_data_job(self, request: Any) -> Any:
        job = self._job(request.resource_name)
        if job.status != STATUS.PENDING:
            self._refuse_request("offline_user_data_job_error", "JOB_ALREADY_STARTED", request.resource_name)
        job.status = STATUS.RUNNING
        if not self.hold:
            self._work_off(job, None, 0)
        return operations_pb2.Operation(name=f"{request.resource_name}/operation")

    def _work_off(self, job: JobState, fail: str | None, share: float) -> None:
        job.status = STATUS.FAILED if fail else STATUS.SUCCESS
        if fail:
            job.reason = getattr(REASON, fail)
        done = round(len(job.operations) * share) if fail else len(job.operations)
        self.change(job.list_id, bool(job.removing), job.operations[:done])

    # --- GoogleAdsService ---

    def search(self, request: Any) -> Any:
        self._account(request.customer_id)
        if request.page_size:
            self._refuse_request("request_error", "PAGE_SIZE_NOT_SUPPORTED", "the size of pages is Google's")
        resource, fields, conditions = self._parsed(request.query)
        rows = [row for row in self._rows(resource) if all(self._holds(row, *one) for one in conditions)]
        start = int(request.page_token or 0)
        response = google_ads_service.SearchGoogleAdsResponse(total_results_count=len(rows))
        for row in rows[start : start + self.page]:
            shown = google_ads_service.GoogleAdsRow()
            for name in fields:
                *path, last = name.split(".")
                target, source = getattr(shown, path[0]), row
                for step in path[1:]:
                    target, source = getattr(target, step), getattr(source, step)
                last = "type_" if last == "type" else last
                setattr(target, last, getattr(source, last))
            response.results.append(shown)
        if start + self.page < len(rows):
            response.next_page_token = str(start + self.page)
        return response

    def _parsed(self, query: str) -> tuple[str, list[str], list[tuple[str, str, str]]]:
        """The query language, as far as it is needed: SELECT fields FROM one WHERE name = 'value' or IN (…)."""
        match = re.fullmatch(r"SELECT (.+?) FROM (\w+)(?: WHERE (.+))?", query)
        if not match or match[2] not in RESOURCES:
            self._refuse_request("query_error", "UNEXPECTED_INPUT", query)
        fields = match[1].split(", ")
        condition = r"([\w.]+) (=|IN) ('(?:[^'\\]|\\.)*'|\d+|\(\d+(?:, \d+)*\))"
        parts = re.split(r" AND (?=[\w.]+ )", match[3]) if match[3] else []
        conditions: list[tuple[str, str, str]] = []
        for part in parts:
            found = re.fullmatch(condition, part)
            if not found:
                self._refuse_request("query_error", "BAD_VALUE", part)
            conditions.append((found[1], found[2], found[3]))
        for name in [*fields, *(name for name, _, _ in conditions)]:
            kind: Any = RESOURCES[match[2]]
            first, *steps = name.split(".")
            if first != match[2]:
                self._refuse_request("query_error", "PROHIBITED_RESOURCE_TYPE_IN_SELECT_CLAUSE", name)
            for step in steps:
                known = {one.name.removesuffix("_"): one for one in kind.meta.fields.values()}
                if step not in known:
                    self._refuse_request("query_error", "UNRECOGNIZED_FIELD", name)
                kind = known[step].message
        return match[2], fields, conditions

    def _rows(self, resource: str) -> Iterator[Any]:
        if resource == "customer":
            yield Customer(id=int(self.customer_id), descriptive_name="Our shop")
            return
        if resource == "user_list":
            yield from self.lists.values()
            return
        for job in self.jobs.values():
            yield OfflineUserDataJob(
                id=job.number,
                external_id=job.external_id,
                status=job.status,
                failure_reason=job.reason,
                customer_match_user_list_metadata={"user_list": job.list_id},
            )

    @staticmethod
    def _holds(row: Any, name: str, operator: str, literal: str) -> bool:
        value = getattr(row, name.split(".", 1)[1])
        text = value.name if hasattr(value, "name") else str(value)
        if operator == "IN":
            return text in literal.strip("()").split(", ")
        wanted = re.sub(r"\\(.)", r"\1", literal[1:-1]) if literal.startswith("'") else literal
        return bool(text == wanted)

    # --- serving ---

    def methods(self) -> Mapping[str, Mapping[str, tuple[Callable[[Any], Any], type[Any]]]]:
        jobs, lists = offline_user_data_job_service, user_list_service
        return {
            "UserListService": {"MutateUserLists": (self.mutate_user_lists, lists.MutateUserListsRequest)},
            "GoogleAdsService": {"Search": (self.search, google_ads_service.SearchGoogleAdsRequest)},
            "OfflineUserDataJobService": {
                "CreateOfflineUserDataJob": (
                    self.create_offline_user_data_job,
                    jobs.CreateOfflineUserDataJobRequest,
                ),
                "AddOfflineUserDataJobOperations": (
                    self.add_offline_user_data_job_operations,
                    jobs.AddOfflineUserDataJobOperationsRequest,
                ),
                "RunOfflineUserDataJob": (self.run_offline_user_data_job, jobs.RunOfflineUserDataJobRequest),
            },
        }
