"""Owns the destination Google Ads: audiences as Customer Match lists, uploaded in jobs by the official client.

Google takes a batch as a job and works it off later, within minutes or a day. So an outcome says that the job has the
member, and names the job; `review` asks what became of jobs that were still under way.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final, NamedTuple

from pydantic import Field

from audiences.destinations import customer_match
from audiences.destinations.customer_match import (
    BUSY,
    DESCRIPTION,
    CustomerMatch,
    Upload,
    name_of,
    settled,
    takes_no_contacts,
    uploads,
)
from audiences.destinations.options import Secret
from audiences.destinations.protocol import Busy, DestinationError, Limits, Outcome, Person, Rejected
from service.core.errors import PropensityError

VERSION: Final = "v26"  # of the API; each lives for about a year, and the client has the modules of four
SCOPE: Final = "https://www.googleapis.com/auth/adwords"
MEMBERS: Final = 10_000  # a request
IDENTIFIERS_OF_A_REQUEST: Final = 10_000  # recommended by Google's support; more than 100,000 are refused
IDENTIFIERS_OF_AN_OPERATION: Final = 20
REQUESTS_A_MINUTE: Final = 300
REQUESTS_OF_A_BATCH: Final = 10  # a job is made, filled in one to seven requests, and run; and one look at other jobs
FIELDS: Final = {"google.email": "hashed_email", "google.phone": "hashed_phone_number"}  # of UserIdentifier
PASSING: Final = {  # errors that pass by themselves, whatever status they come with
    "database_error": {"CONCURRENT_MODIFICATION"},
    "internal_error": {"INTERNAL_ERROR", "TRANSIENT_ERROR", "DEADLINE_EXCEEDED"},
    "quota_error": {
        "RESOURCE_EXHAUSTED",
        "RESOURCE_TEMPORARILY_EXHAUSTED",
        "EXCESSIVE_SHORT_TERM_QUERY_RESOURCE_CONSUMPTION",
        "EXCESSIVE_LONG_TERM_QUERY_RESOURCE_CONSUMPTION",
    },
}
JOB: Final = re.compile(r"job (\d+): ([A-Z]+)")


class Options(customer_match.Options):
    """Those of Customer Match, and what this API has of its own."""

    developer_token: Secret = Field(description="Of the API centre of the manager account.")
    wait_s: float = Field(0, ge=0, le=3600, description="Seconds to wait for the end of each job.")
    endpoint: str = Field("googleads.googleapis.com", description="Host of the API; another one only for tests.")


class Job(NamedTuple):
    """A job of Google's as it stands: the identifier, its list, our mark on it, and how far it is."""

    number: int
    list_id: str
    mark: int
    status: str
    reason: str

    @property
    def outcome(self) -> Outcome:
        why = f" {self.reason}" if self.status == "FAILED" and self.reason not in {"", "UNSPECIFIED"} else ""
        return Outcome(self.status != "FAILED", f"job {self.number}: {self.status}{why}", self.is_over)

    @property
    def is_over(self) -> bool:
        """Whether Google has worked it off, well or not."""
        return self.status in {"SUCCESS", "FAILED"}


def build(name: str, options: Options) -> GoogleAds:
    """The destination. Raises PropensityError where the extra is missing or there are no credentials."""
    try:
        from google.ads.googleads.client import GoogleAdsClient
    except ModuleNotFoundError as error:
        raise PropensityError(
            f"{name}: the kind google-ads needs {error.name}, which is not installed; "
            "install it with pip install 'propensity[google-ads]'"
        ) from None
    # At INFO and DEBUG the client logs whole requests, hashes included; what its warnings say our errors say.
    for logger in ("google.ads.googleads.client", f"google.ads.googleads.{VERSION}"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    credentials = customer_match.credentials(name, options, SCOPE)
    client = GoogleAdsClient(
        credentials=credentials,
        developer_token=options.developer_token.get_secret_value(),
        endpoint=options.endpoint,
        login_customer_id=options.login_customer_id,
        version=VERSION,
        use_proto_plus=False,
    )
    return GoogleAds(name, options, client, credentials)


class GoogleAds(CustomerMatch):
    """By the Google Ads API: a job of its own for each batch."""

    limits = Limits(MEMBERS, REQUESTS_A_MINUTE // REQUESTS_OF_A_BATCH, 60.0)
    forms: tuple[str, ...] = tuple(FIELDS)

    def __init__(self, name: str, options: Options, client: Any, credentials: Any) -> None:
        super().__init__(name, options, credentials)
        self._wait_s = options.wait_s
        self._client = client
        self._services: dict[str, Any] = {}
        self._jobs: set[int] = set()  # of this synchronisation
        self._clear: set[tuple[str, bool]] = set()  # lists and directions that no job from before can overtake

    def review(self, answers: Sequence[str]) -> Sequence[Outcome | None]:
        """What became of answers that named a job under way, in their order; None where that is not known yet."""
        numbers = {int(match[1]) for answer in answers if (match := JOB.match(answer))}
        jobs: dict[int, Job] = {}
        remaining = iter(sorted(numbers))
        while part := list(islice(remaining, 1000)):
            listed = ", ".join(map(str, part))
            jobs |= {job.number: job for job in self._jobs_where(f"offline_user_data_job.id IN ({listed})")}
        found = [jobs.get(int(match[1])) if (match := JOB.match(answer)) else None for answer in answers]
        return [job.outcome if job and job.is_over else None for job in found]

    def check(self) -> str:
        """Ask for the account's name."""
        for row in self._search("SELECT customer.id, customer.descriptive_name FROM customer"):
            return f"Google Ads shows the account {row.customer.id}, {row.customer.descriptive_name!r}"
        raise Rejected(f"Google Ads shows no account {self._options.customer_id}")

    # --- lists ---

    def _found(self, name: str) -> str | None:
        quoted = name.replace("\\", "\\\\").replace("'", "\\'")
        rows = self._search(
            "SELECT user_list.resource_name, user_list.type, user_list.read_only, user_list.membership_status, "
            "user_list.membership_life_span, user_list.crm_based_user_list.upload_key_type FROM user_list "
            f"WHERE user_list.name = '{quoted}'"
        )
        lists = [row.user_list for row in rows if not row.user_list.read_only]
        if not lists:
            return None
        enums = self._client.enums
        for one in lists:
            is_contacts = one.type_ == enums.UserListTypeEnum.CRM_BASED and (
                one.crm_based_user_list.upload_key_type == enums.CustomerMatchUploadKeyTypeEnum.CONTACT_INFO
            )
            if is_contacts and one.membership_status == enums.UserListMembershipStatusEnum.OPEN:
                return self._usable(name, str(one.resource_name), one.membership_life_span)
        raise takes_no_contacts(name)

    def _made(self, name: str) -> str:
        request = self._client.get_type("MutateUserListsRequest")
        request.customer_id = self._options.customer_id
        made = request.operations.add().create
        made.name = name
        made.description = DESCRIPTION
        made.membership_life_span = self._options.membership_days
        made.crm_based_user_list.upload_key_type = self._client.enums.CustomerMatchUploadKeyTypeEnum.CONTACT_INFO
        response = self._call("UserListService", "mutate_user_lists", request)
        return str(response.results[0].resource_name)

    # --- members ---

    def _upload(self, list_id: str, people: Sequence[Person], *, removing: bool) -> list[Outcome]:
        entries, refused = uploads(people, FIELDS, IDENTIFIERS_OF_AN_OPERATION)
        if not entries:
            return [refused[place] for place in range(len(people))]
        self._let_opposite_jobs_finish(list_id, removing)
        job = self._new_job(list_id, removing)
        taken: set[int] = set()
        for part in _requests(entries):
            failures = self._fill(job, part, removing)
            for place, upload in enumerate(part):
                if place in failures:
                    refused[upload.place] = Outcome(False, failures[place])
                else:
                    taken.add(upload.place)
        if not taken:
            return [refused[place] for place in range(len(people))]
        request = self._client.get_type("RunOfflineUserDataJobRequest")
        request.resource_name = job
        self._call("OfflineUserDataJobService", "run_offline_user_data_job", request)
        outcome = self._end_of(int(job.rpartition("/")[2])).outcome
        return settled(len(people), taken, refused, outcome, removing=removing)

    def _let_opposite_jobs_finish(self, list_id: str, removing: bool) -> None:
        """Jobs may be worked off side by side, so that an older one could undo what this one does."""
        if (list_id, removing) in self._clear:
            return
        running = [
            job.number
            for job in self._jobs_where("offline_user_data_job.status = 'RUNNING'")
            if job.list_id == list_id and job.mark and job.mark % 2 != removing and job.number not in self._jobs
        ]
        if running:
            raise Busy(
                f"Google Ads still works off {'additions' if removing else 'removals'} of an earlier synchronisation, "
                f"in job {', '.join(map(str, running))}; it takes minutes, or a day at most",
                60.0,
            )
        self._clear.add((list_id, removing))

    def _new_job(self, list_id: str, removing: bool) -> str:
        enums = self._client.enums
        request = self._client.get_type("CreateOfflineUserDataJobRequest")
        request.customer_id = self._options.customer_id
        request.job.type_ = enums.OfflineUserDataJobTypeEnum.CUSTOMER_MATCH_USER_LIST
        request.job.external_id = secrets.randbits(61) * 2 + 2 + removing  # our mark: odd where it removes
        metadata = request.job.customer_match_user_list_metadata
        metadata.user_list = list_id
        if not removing:  # who is removed may have agreed to nothing
            metadata.consent.ad_user_data = enums.ConsentStatusEnum.GRANTED
            metadata.consent.ad_personalization = enums.ConsentStatusEnum.GRANTED
        response = self._call("OfflineUserDataJobService", "create_offline_user_data_job", request)
        self._jobs.add(int(response.resource_name.rpartition("/")[2]))
        return str(response.resource_name)

    def _fill(self, job: str, uploads: Sequence[Upload], removing: bool) -> dict[int, str]:
        """Give operations to a job; what it did not take, by place."""
        request = self._client.get_type("AddOfflineUserDataJobOperationsRequest")
        request.resource_name = job
        request.enable_partial_failure = True
        for upload in uploads:
            operation = request.operations.add()
            data = operation.remove if removing else operation.create
            for field, value in upload.identifiers:
                setattr(data.user_identifiers.add(), field, value)
        response = self._call("OfflineUserDataJobService", "add_offline_user_data_job_operations", request)
        return self._partial_failures(response.partial_failure_error, len(uploads))

    def _partial_failures(self, status: Any, count: int) -> dict[int, str]:
        found: dict[int, str] = {}
        for detail in status.details:
            failure = self._client.get_type("GoogleAdsFailure")
            if not detail.Unpack(failure):
                continue
            for error in failure.errors:
                if _passes(error):
                    raise Busy(f"Google Ads: {_words(error)}", _delay_s([error]))
                path = error.location.field_path_elements
                where = [element.index for element in path if element.field_name == "operations"]
                places = where[:1] or range(count)  # an error without a place is everybody's
                found |= {place: _words(error) for place in places if place not in found}
        if status.code and not found:
            found = dict.fromkeys(range(count), f"{status.message[:200]}")
        return found

    # --- jobs ---

    def _end_of(self, number: int) -> Job:
        """The job when it ended, or as it stands when the time to wait is over. Raises Busy where it failed."""
        started = time.monotonic()
        pause_s = 1.0
        job = Job(number, "", 0, "RUNNING", "")
        while (left_s := self._wait_s - (time.monotonic() - started)) > 0:
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, 60.0)
            job = next(iter(self._jobs_where(f"offline_user_data_job.id = {number}")), job)
            if job.status == "FAILED":  # not for anything about its members, so the batch is to be sent again
                raise Busy(f"Google Ads: {job.outcome.answer}")
            if job.status == "SUCCESS":
                break
        return job

    def _jobs_where(self, condition: str) -> list[Job]:
        rows = self._search(
            "SELECT offline_user_data_job.id, offline_user_data_job.external_id, offline_user_data_job.status, "
            "offline_user_data_job.failure_reason, "
            "offline_user_data_job.customer_match_user_list_metadata.user_list "
            f"FROM offline_user_data_job WHERE {condition}"
        )
        jobs = [row.offline_user_data_job for row in rows]
        return [
            Job(
                job.id,
                job.customer_match_user_list_metadata.user_list,
                job.external_id,
                name_of(job, "status"),
                name_of(job, "failure_reason"),
            )
            for job in jobs
        ]

    # --- requests ---

    def _search(self, query: str) -> list[Any]:
        request = self._client.get_type("SearchGoogleAdsRequest")
        request.customer_id = self._options.customer_id
        request.query = query
        with _told():
            return list(self._call("GoogleAdsService", "search", request))  # asks for further pages itself

    def _call(self, service: str, method: str, request: Any) -> Any:
        """One request, not tried again here, with a deadline: left to itself the client has none."""
        with _told():
            self._refresh()
            if service not in self._services:
                self._services[service] = self._client.get_service(service)
            return getattr(self._services[service], method)(
                request=request, retry=None, timeout=self._options.timeout_s
            )


def _requests(uploads: Sequence[Upload]) -> Iterator[list[Upload]]:
    part: list[Upload] = []
    count = 0
    for upload in uploads:
        if count + len(upload.identifiers) > IDENTIFIERS_OF_A_REQUEST:
            yield part
            part, count = [], 0
        part.append(upload)
        count += len(upload.identifiers)
    if part:
        yield part


# --- errors ---


@contextmanager
def _told() -> Iterator[None]:
    """Turn what the client raises into what the synchronisation understands, without what was sent."""
    from google.ads.googleads.errors import GoogleAdsException
    from google.api_core.exceptions import GoogleAPICallError

    try:
        yield
    except GoogleAdsException as error:
        raise _error(error.error.code().name, _plain(error.failure).errors, error.request_id) from None
    except GoogleAPICallError as error:
        code = error.grpc_status_code.name if error.grpc_status_code else "UNKNOWN"
        trailing = {} if not error.errors else dict(error.errors[0].trailing_metadata() or ())
        raise _error(code, _failures(trailing), trailing.get("request-id")) from None


def _error(code: str, errors: Sequence[Any], request_id: str | None) -> DestinationError:
    words = "; ".join(_words(error) for error in errors[:3]) or code
    message = f"Google Ads: {words}" + (f" (request {request_id})" if request_id else "")
    if (errors and all(_passes(error) for error in errors)) or (code in BUSY and not any(map(_lasts, errors))):
        return Busy(message, _delay_s(errors))
    return Rejected(message)


def _failures(trailing: dict[str, Any]) -> Sequence[Any]:
    from google.ads.googleads.v26.errors.types.errors import GoogleAdsFailure

    raw = trailing.get(f"google.ads.googleads.{VERSION}.errors.googleadsfailure-bin")
    return _plain(GoogleAdsFailure.deserialize(raw)).errors if raw else ()


def _plain(message: Any) -> Any:
    """The protocol buffer inside a message of proto-plus."""
    return type(message).pb(message) if hasattr(type(message), "pb") else message


def _code(error: Any) -> tuple[str, str]:
    kind = error.error_code.WhichOneof("error_code")
    return (kind, name_of(error.error_code, kind)) if kind else ("", "")


def _passes(error: Any) -> bool:
    kind, name = _code(error)
    return name in PASSING.get(kind, ())


def _lasts(error: Any) -> bool:
    kind, name = _code(error)
    return bool(kind) and name not in PASSING.get(kind, ())


def _words(error: Any) -> str:
    return f"{_code(error)[1] or 'error'}: {error.message[:200]}"


def _delay_s(errors: Sequence[Any]) -> float | None:
    """The longest wait that the errors ask for."""
    delays = [error.details.quota_error_details.retry_delay for error in errors]
    return max((delay.seconds + delay.nanos / 1e9 for delay in delays), default=0.0) or None
