"""What went wrong with a request to S3: whether to repeat it, and what to tell a person."""

from __future__ import annotations

from enum import Enum, auto

import aiohttp
import botocore.exceptions as boto
from botocore.parsers import ResponseParserError

from dist_ckpt.errors import (
    CheckpointError,
    ErrorKind,
    StorageError,
    UsageError,
    describe,
)

FOREIGN = (
    boto.BotoCoreError,
    boto.ClientError,
    ResponseParserError,
    aiohttp.ClientError,
    # Also every `TimeoutError`, by which a request that stands still is ended.
    OSError,
)
"""Every error that a request may raise: what the one edge of this backend catches."""

# An answer to HEAD has no body: botocore makes a code of its status.
NO_SUCH_OBJECT = frozenset({"NoSuchKey", "404", "NotFound"})
EXISTS = frozenset({"PreconditionFailed", "412"})
BEHIND_THE_END = frozenset({"InvalidRange", "416"})
NO_SUCH_UPLOAD = frozenset({"NoSuchUpload"}) | NO_SUCH_OBJECT
"""Ceph says "NoSuchKey" of an upload that ended a moment ago."""

NO_SUCH_BUCKET = "NoSuchBucket"
NOT_IMPLEMENTED = frozenset({"NotImplemented", "501"})

_SLOW_DOWN = frozenset(
    {
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "Throttling",
        "ThrottlingException",
        "RequestLimitExceeded",
        "TooManyRequests",
        "BandwidthLimitExceeded",
        "ServiceUnavailable",
        "503",
        "429",
    }
)
# By their codes, as most of them come with a status below 500; all above are repeated anyway.
_AGAIN = frozenset(
    {
        "InternalError",
        "RequestTimeout",
        "OperationAborted",
        "ConditionalRequestConflict",
        # Bytes that were damaged or lost on the way: in memory they are still what they were.
        "BadDigest",
        "IncompleteBody",
        "XAmzContentChecksumMismatch",
    }
)
_EXPIRED = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
)
_FULL = frozenset({"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "507"})
_SECRET = frozenset(
    {"SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken", "InvalidSecurity"}
)
_FORBIDDEN = frozenset({"AccessDenied", "AllAccessDisabled", "AccountProblem", "403", "401"})
_REGION = frozenset(
    {
        "PermanentRedirect",
        "TemporaryRedirect",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
        "301",
        "307",
    }
)
_ACTIONS = {
    "HeadObject": "s3:GetObject and s3:ListBucket",
    "GetObject": "s3:GetObject and s3:ListBucket",
    "ListObjectsV2": "s3:ListBucket",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "ListParts": "s3:ListMultipartUploadParts",
}
"""What the policy of a bucket calls the right to make a request, where that differs."""

_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.TokenRetrievalError,
    boto.SSOError,
    boto.UnauthorizedSSOTokenError,
)
_CONNECTION = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.ResponseStreamingError,
    boto.IncompleteReadError,
)
_WRONG_CALL = (
    boto.ProfileNotFound,
    boto.ParamValidationError,
    boto.InvalidS3AddressingStyleError,
    boto.InvalidConfigError,
    boto.ConfigParseError,
    boto.ConfigNotFound,
)


class Truncated(ConnectionError):
    """Fewer bytes arrived than were announced."""


class Changed(ConnectionError):
    """Two answers about one object came from two versions of it."""


class Verdict(Enum):
    """What to do about a failed request."""

    FINAL = auto()
    AGAIN = auto()
    SLOW_DOWN = auto()
    EXPIRED = auto()


def code_of(error: BaseException) -> str:
    """Return the code with which the server refused a request, "" where it did not answer."""
    if isinstance(error, boto.ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))
    return ""


def judge(error: BaseException) -> Verdict:
    """Return whether the request that ended in `error` may succeed when it is repeated."""
    if isinstance(error, boto.ClientError):
        code, status = code_of(error), status_of(error)
        if code in _EXPIRED:
            return Verdict.EXPIRED
        # Before the status is looked at: 501 and 507 would be repeated as outages.
        if code in _FULL or code in NOT_IMPLEMENTED:
            return Verdict.FINAL
        if code in _SLOW_DOWN or status in (429, 503):
            return Verdict.SLOW_DOWN
        # Every other 4xx says that the request is wrong, and it would be the same again.
        return Verdict.AGAIN if code in _AGAIN or status >= 500 else Verdict.FINAL
    # A changed object is begun anew by `Download.run`, from its first byte; here only the piece
    # would be repeated, and mix two versions.
    if isinstance(error, (*_CREDENTIALS, *_WRONG_CALL, boto.SSLError, Changed)):
        return Verdict.FINAL
    # Before the errors of connections: aiobotocore wraps it in an `HTTPClientError`.
    if is_redirected(error):
        return Verdict.FINAL
    if isinstance(error, _CONNECTION):
        return Verdict.AGAIN
    if isinstance(error, boto.BotoCoreError):
        return Verdict.FINAL
    return Verdict.AGAIN


def is_redirected(error: BaseException) -> bool:
    """Whether the server sent a put elsewhere, which no client can follow with a spent body."""
    cause: BaseException | None = error
    while cause is not None:
        if "follow redirect" in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def is_forbidden(error: BaseException) -> bool:
    """Whether the server refused the request for a lack of rights, as far as it says."""
    return code_of(error) in _FORBIDDEN or status_of(error) in (401, 403)


def status_of(error: BaseException) -> int:
    """Return the HTTP status of the refusal, 0 where the server did not answer."""
    if isinstance(error, boto.ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return 0


def to_error(error: BaseException, doing: str, url: str) -> CheckpointError:
    """Return the error of this package that says what `error` means.

    Args:
        error: one of `FOREIGN`.
        doing: what was tried, as in "put a/b".
        url: of the store.
    """
    where = f"cannot {doing} in {url}"
    if isinstance(error, boto.ClientError):
        return _refused(error, where, url)
    if isinstance(error, _CREDENTIALS):
        return StorageError(
            f"{where}: no usable credentials ({describe(error)}); set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or give profile= or anon=True in "
            "storage_options",
            kind=ErrorKind.PERMISSION,
        )
    if isinstance(error, _WRONG_CALL):
        return UsageError(f"{where}: {describe(error)}; correct the storage_options or the url")
    if isinstance(error, boto.SSLError):
        return StorageError(
            f"{where}: no trusted connection ({describe(error)}); check the certificates, or give "
            "client_kwargs={'verify': 'bundle.pem'} in storage_options"
        )
    if isinstance(error, Changed):
        return StorageError(f"{where}: {error}; what else writes to it?")
    if is_redirected(error):
        return StorageError(
            f"{where}: the server sends the put elsewhere, so the bucket is in another region or "
            "the endpoint is wrong: give client_kwargs={'region_name': ...} in storage_options or "
            "set AWS_DEFAULT_REGION"
        )
    slow = (TimeoutError, boto.ReadTimeoutError, boto.ConnectTimeoutError)
    if isinstance(error, slow):
        return StorageError(
            f"{where}: the server does not answer ({describe(error)}); check the endpoint and the "
            "network",
            kind=ErrorKind.TIMEOUT,
        )
    return StorageError(f"{where}: {describe(error)}; check the endpoint and the network")


def _refused(error: boto.ClientError, where: str, url: str) -> CheckpointError:
    code = code_of(error)
    said = error.response.get("Error", {}).get("Message") or "no message"
    message = f"{where}: {code}: {said}"
    if code == NO_SUCH_BUCKET:
        return StorageError(
            f"{message}; create the bucket first, or correct its name", kind=ErrorKind.NO_BUCKET
        )
    if code in _SECRET or code in _EXPIRED:
        return StorageError(
            f"{message}; check the access key, the secret and the session token",
            kind=ErrorKind.PERMISSION,
        )
    if code in _REGION:
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        region = error.response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region")
        return StorageError(
            f"{message}; the bucket is in {region or 'another region'}: give "
            "client_kwargs={'region_name': ...} in storage_options or set AWS_DEFAULT_REGION"
        )
    if code in _FULL:
        return StorageError(f"{message}; make room or raise the quota", kind=ErrorKind.STORAGE_FULL)
    if is_forbidden(error):
        name = error.operation_name
        return StorageError(
            f"{message}; check the credentials, and allow them {_ACTIONS.get(name, f's3:{name}')}",
            kind=ErrorKind.PERMISSION,
        )
    if code in ("InvalidBucketName", "KeyTooLongError", "InvalidURI", "EntityTooLarge"):
        return UsageError(f"{message}; correct {url} or the key")
    return StorageError(f"{message}; the server refused {error.operation_name}")
