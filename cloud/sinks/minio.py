"""The archive in a bucket of MinIO, or of any store that speaks S3.

`prepare` makes the bucket where it is missing, asks the store what it can do (`probe`), sets the lifecycle, and says
once, in words, what the archive does without (`notes`; `/readyz` shows them):

    conditional PUT   makes Delta's commits safe between writers; without it one alone may run, and none checks
    versioning        deleted and compacted files stay as old versions: the lifecycle removes these after 30 days
    object lock       as versioning, and nothing can be removed before its time: vacuum frees no room
    lifecycle         without it, old versions and unfinished uploads are the operator's to remove
    encryption        said, never required: the readings are as private as the store keeps them

The lifecycle never touches a current file: Delta's log knows which are needed, a rule by age does not. Rules of others
are left as they are. Calls block; errors of the store become ours here.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import urlsplit

import msgspec

from cloud.sinks.contract import RetryLater, SinkBroken
from config.cloud import Archive
from sync.identity import IdentityError, read_secret

if TYPE_CHECKING:
    from minio.lifecycleconfig import LifecycleConfig, Rule

T = TypeVar("T")

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 5.0
READ_TIMEOUT_S: Final = 60.0
OLD_VERSIONS_DAYS: Final = 30
UNFINISHED_DAYS: Final = 7
PROBE_PREFIX: Final = "headgate-probe/"
RULE_VERSIONS: Final = "headgate-old-versions"
RULE_UPLOADS: Final = "headgate-unfinished-uploads"

#: What the store says when the credentials or what they may do are to blame (S3 API, error responses).
_CREDENTIALS: Final = (
    "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AllAccessDisabled", "AuthorizationHeaderMalformed",
    "ExpiredToken", "InvalidToken", "AccountProblem",
)  # fmt: skip
_CONFIGURATION: Final = (
    "NoSuchBucket", "InvalidBucketName", "PermanentRedirect", "BucketAlreadyExists", "InvalidRegion", "NotImplemented",
    "IllegalLocationConstraintException",
)  # fmt: skip


_NOT_SET: Final = ("ObjectLockConfigurationNotFoundError", "ServerSideEncryptionConfigurationNotFoundError")


class Capabilities(msgspec.Struct, frozen=True):
    """What the store can do. None: it does not say."""

    conditional_put: bool
    versioning: bool | None
    object_lock: bool | None
    encryption: bool | None
    lifecycle: bool | None


class Bucket:
    """One bucket, as the archive needs it (`archive_store.Store`)."""

    def __init__(self, settings: Archive) -> None:
        """Raises `SinkBroken` for an address or credentials that cannot work."""
        import urllib3
        from minio import Minio

        assert settings.endpoint is not None  # noqa: S101 - else the archive is a folder
        self.capabilities: Capabilities | None = None
        self.notes: tuple[str, ...] = ()
        self._settings = settings
        self._where = f"archive {settings.endpoint}/{settings.bucket}"
        url = urlsplit(settings.endpoint)
        if url.scheme not in ("http", "https") or not url.netloc or url.path not in ("", "/"):
            raise SinkBroken(f"archive.endpoint {settings.endpoint!r}: expected https://host:port")
        access_key = _access_key(settings)
        try:
            secret_key = read_secret(
                "archive.secret_key", file=settings.secret_key_file, env=settings.secret_key_env
            )
        except IdentityError as err:
            raise SinkBroken(str(err)) from err
        self._http = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S),
            retries=False,  # the runner retries, and it alone
            maxsize=2,
        )
        try:
            self._client = Minio(
                url.netloc,
                access_key=access_key,
                secret_key=secret_key.reveal(),
                secure=url.scheme == "https",
                region=settings.region,
                http_client=self._http,
            )
        except ValueError as err:
            raise SinkBroken(f"{self._where}: {err}; check endpoint and region") from err
        self._options = {
            "AWS_ENDPOINT_URL": settings.endpoint.rstrip("/"),
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key.reveal(),
            "AWS_REGION": settings.region,
            "AWS_ALLOW_HTTP": "true" if url.scheme == "http" else "false",
            "AWS_CONDITIONAL_PUT": "etag",
            "connect_timeout": f"{CONNECT_TIMEOUT_S:g}s",
            "timeout": f"{READ_TIMEOUT_S:g}s",
            "max_retries": "1",
            "retry_timeout": "10s",
        }

    # --- Store ---

    @property
    def options(self) -> dict[str, str] | None:
        return dict(self._options)

    def address(self, table: str) -> str:
        return f"s3://{self._settings.bucket}/{table}"

    def put(self, table: str, path: str, data: memoryview) -> None:
        """Durable when the store has answered."""
        with self._errors():
            self._client.put_object(self._settings.bucket, f"{table}/{path}", io.BytesIO(data), len(data))

    def has(self, table: str, path: str) -> bool:
        from minio.error import S3Error

        with self._errors():
            try:
                self._client.stat_object(self._settings.bucket, f"{table}/{path}")
            except S3Error as err:
                if err.code in ("NoSuchKey", "NoSuchObject"):
                    return False
                raise
        return True

    def settle(self, table: str) -> None:
        """Nothing: an object is durable when its PUT is answered."""

    def mend(self, table: str) -> None:
        """Nothing: an object is there whole or not at all."""

    # --- setting up ---

    def prepare(self) -> None:
        """Bucket, probe and lifecycle. Raises `RetryLater`, `SinkBroken`."""
        with self._errors():
            bucket = self._settings.bucket
            if not self._client.bucket_exists(bucket):
                self._client.make_bucket(bucket, location=self._settings.region)
                log.info("%s: created", self._where)
        self.capabilities = found = self.probe()
        if not found.conditional_put:
            # Safe as long as there is one writer (delta-rs, S3 storage options).
            self._options["AWS_S3_ALLOW_UNSAFE_RENAME"] = "true"
            del self._options["AWS_CONDITIONAL_PUT"]
        lifecycle = self._lifecycle(found)
        self.capabilities = msgspec.structs.replace(found, lifecycle=lifecycle)
        self.notes = notes(self.capabilities)
        for note in self.notes:
            log.warning("%s: %s", self._where, note)

    def probe(self) -> Capabilities:
        """Asks the store; what it does not answer for want of a permission is None. Raises as `prepare` does."""
        bucket, client = self._settings.bucket, self._client
        versioning = self._asked(lambda: client.get_bucket_versioning(bucket).status == "Enabled")
        locked = self._asked(self._locked)
        encrypted = self._asked(lambda: client.get_bucket_encryption(bucket) is not None)
        return Capabilities(self._conditional_put(), versioning, locked, encrypted, None)

    def _asked(self, question: Callable[[], bool]) -> bool | None:
        from minio.error import S3Error

        with self._errors():
            try:
                return question()
            except S3Error as err:
                if err.code in _NOT_SET:
                    return False
                if err.code in _CREDENTIALS and err.code != "AccessDenied":
                    raise
                return None
            except ValueError:  # answered, in a form that the client does not read
                return None

    def _locked(self) -> bool:
        # Only a bucket with a lock has a configuration of it; the client cannot read one whose rule is empty.
        with contextlib.suppress(ValueError):
            self._client.get_object_lock_config(self._settings.bucket)
        return True

    def _conditional_put(self) -> bool:
        """Whether a second PUT of one name with `If-None-Match: *` is refused."""
        bucket, name = self._settings.bucket, f"{PROBE_PREFIX}{uuid.uuid4()}"
        with self._errors():
            address = self._client.get_presigned_url(
                "PUT", bucket, name, expires=datetime.timedelta(minutes=5)
            )
            answers = [
                self._http.request("PUT", address, body=b"probe", headers={"If-None-Match": "*"}).status
                for _ in range(2)
            ]
            self._client.remove_object(bucket, name)
        if answers[0] in (401, 403):
            raise SinkBroken(
                f"{self._where}: may not write ({answers[0]}); check the access key and its policy"
            )
        return answers[0] == 200 and answers[1] == 412

    def _lifecycle(self, found: Capabilities) -> bool | None:
        """Adds our rules where they are missing or differ. Whether they are in force."""
        from minio.error import S3Error

        with self._errors():
            try:
                current = self._client.get_bucket_lifecycle(self._settings.bucket)
            except S3Error as err:
                if err.code in _CREDENTIALS and err.code != "AccessDenied":
                    raise
                return None
            except ValueError:  # rules that the client does not read would be lost if ours were set
                return None
        for rules in _wanted_rules(versioned=bool(found.versioning)):
            if _in_force(current, rules):
                return True
            others = [rule for rule in (current.rules if current else []) if rule.rule_id not in _OURS]
            if self._set_lifecycle([*others, *rules]):
                return True
        return False

    def _set_lifecycle(self, rules: list[Rule]) -> bool:
        from minio.error import S3Error
        from minio.lifecycleconfig import LifecycleConfig

        with self._errors():
            try:
                self._client.set_bucket_lifecycle(self._settings.bucket, LifecycleConfig(rules))
            except S3Error as err:
                log.info("%s: refuses the lifecycle %s: %s", self._where,
                         ", ".join(str(rule.rule_id) for rule in rules), err.code)  # fmt: skip
                return False
        return True

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        from minio.error import MinioException, S3Error
        from urllib3.exceptions import HTTPError

        try:
            yield
        except S3Error as err:
            text = f"{self._where}: {err.code}: {err.message}"
            if err.code in _CREDENTIALS:
                raise SinkBroken(f"{text}; check the access key, the secret key and the policy") from err
            if err.code in _CONFIGURATION:
                raise SinkBroken(f"{text}; check bucket, region and endpoint") from err
            raise RetryLater(text) from err
        except HTTPError as err:
            if "CERTIFICATE_VERIFY_FAILED" in str(err):
                raise SinkBroken(f"{self._where}: its certificate is not trusted ({err})") from err
            raise RetryLater(f"{self._where}: {err}") from err
        except (MinioException, OSError) as err:
            raise RetryLater(f"{self._where}: {err}") from err
        except ValueError as err:  # the client's own checks, as of a bucket's name
            raise SinkBroken(f"{self._where}: {err}") from err


_OURS: Final = (RULE_VERSIONS, RULE_UPLOADS)


def notes(found: Capabilities) -> tuple[str, ...]:
    """What the archive does without, and what that means."""
    said: list[str] = []
    if not found.conditional_put:
        said.append("no conditional PUT: run one headgate-cloud on this bucket and no other Delta writer")
    if found.object_lock:
        said.append("object lock: files that were compacted or are past their retention keep their room")
    if not found.lifecycle:
        said.append("no lifecycle: old versions and unfinished uploads are to be removed by hand")
    if not found.encryption:
        said.append("no default encryption on the bucket" if found.encryption is False else
                    "the store does not tell whether it encrypts")  # fmt: skip
    return tuple(said)


def _wanted_rules(*, versioned: bool) -> list[list[Rule]]:
    """Our rules, best first; a store that does not know unfinished uploads as a rule gets the rest."""
    from minio.commonconfig import ENABLED, Filter
    from minio.lifecycleconfig import AbortIncompleteMultipartUpload, NoncurrentVersionExpiration, Rule

    everything = Filter(prefix="")
    uploads = Rule(
        ENABLED,
        rule_filter=everything,
        rule_id=RULE_UPLOADS,
        abort_incomplete_multipart_upload=AbortIncompleteMultipartUpload(UNFINISHED_DAYS),
    )
    versions = Rule(
        ENABLED,
        rule_filter=everything,
        rule_id=RULE_VERSIONS,
        noncurrent_version_expiration=NoncurrentVersionExpiration(OLD_VERSIONS_DAYS),
    )
    return [[versions, uploads], [versions]] if versioned else [[uploads], [versions]]


def _in_force(current: LifecycleConfig | None, rules: list[Rule]) -> bool:
    have = {rule.rule_id: rule for rule in (current.rules if current else [])}
    for rule in rules:
        held = have.get(rule.rule_id)
        if held is None or _days(held) != _days(rule) or held.status != rule.status:
            return False
    return True


def _days(rule: Rule) -> tuple[int | None, int | None]:
    uploads, versions = rule.abort_incomplete_multipart_upload, rule.noncurrent_version_expiration
    return (
        uploads.days_after_initiation if uploads else None,
        versions.noncurrent_days if versions else None,
    )


def _access_key(settings: Archive) -> str:
    """Not a secret, so short ones will do; but none is guessed."""
    if settings.access_key_file:
        try:
            key = Path(settings.access_key_file).read_text().strip()
        except OSError as err:
            raise SinkBroken(
                f"archive.access_key_file: cannot read {settings.access_key_file}: {err.strerror}"
            ) from err
    elif settings.access_key_env:
        key = os.environ.get(settings.access_key_env, "").strip()
    else:
        key = ""
    if not key:
        raise SinkBroken("archive: no access key; give access_key_file or access_key_env")
    return key
