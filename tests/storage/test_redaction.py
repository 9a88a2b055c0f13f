"""What of URLs and options is shown: no secret is."""

import pytest

from storage.redaction import public_options, query_free, redact


@pytest.mark.parametrize(
    ("text", "displayed"),
    [
        ("s3://AKIA:hunter2@bucket/x", "s3://***@bucket/x"),
        ("no read of http://me:hunter2@h/a.tar: 403", "no read of http://***@h/a.tar: 403"),
        (
            "http://h/a.tar?X-Amz-Algorithm=AWS4&X-Amz-Credential=AKIA%2F1&X-Amz-Signature=hunter2&X-Amz-Security-Token=t",
            "http://h/a.tar?X-Amz-Algorithm=AWS4&X-Amz-Credential=***&X-Amz-Signature=***&X-Amz-Security-Token=***",
        ),
        ("http://h/a?AWSAccessKeyId=AKIA&Signature=hunter2&Expires=9", "http://h/a?AWSAccessKeyId=***&Signature=***&Expires=9"),
        ("https://acc.blob/x?sv=2024&sp=r&sig=hunter2", "https://acc.blob/x?sv=2024&sp=r&sig=***"),
        ("url='https://h/a?token=hunter2' gone", "url='https://h/a?token=***' gone"),
        ("https://h/a?code=hunter2&jwt=hunter2&pwd=hunter2&page=2", "https://h/a?code=***&jwt=***&pwd=***&page=2"),
        ("https://h/a?versionId=9#access_token=hunter2", "https://h/a?versionId=9#access_token=***"),
        ("http://me:p@hunter2@h/a.tar?x=a@b", "http://***@h/a.tar?x=***"),
        ("plain text, a/b@c.tar", "plain text, a/b@c.tar"),
        ("s3://AKIA:hun/ter2@bucket/x", "s3://***@bucket/x"),
        ("http://h:9000/a@b x2=lift:s3://b/c@int8", "http://h:9000/a@b x2=lift:s3://b/c@int8"),
    ],
)
def test_credentials_in_urls_are_blanked(text, displayed):
    assert redact(text) == displayed


OPTIONS = {
    "s3": {"key": "AKIDEXAMPLE", "secret": "hunter2", "endpoint_url": "http://h:9000", "client_kwargs": {"region_name": "eu-1"}},
    "abfs": {"account_name": "acc", "connection_string": "AccountKey=hunter2", "sas_token": "hunter2"},
    "http": {"client_kwargs": {"headers": {"Authorization": "Bearer hunter2", "Cookie": "id=hunter2", "Accept": "*/*"}}},
    "gs": {"token": {"private_key": "hunter2", "client_email": "me@x"}},
    "sftp": {"username": "me", "passphrase": "hunter2", "auth": ["me", "hunter2"], "port": 22},
    "ftp": {"pwd": "hunter2", "jwt": "hunter2", "pin": 48151623, "any": [{"thing": "hunter2"}], "verify": ["ca.pem"]},
}


def test_secrets_among_options_are_blanked_and_the_rest_is_shown():
    displayed = public_options(OPTIONS)

    assert "hunter2" not in str(displayed)
    assert "48151623" not in str(displayed)
    assert displayed["ftp"]["verify"] == ["ca.pem"]
    assert "AKIDEXAMPLE" not in str(displayed)
    assert displayed["s3"]["endpoint_url"] == "http://h:9000"
    assert displayed["s3"]["client_kwargs"] == {"region_name": "eu-1"}
    assert displayed["abfs"]["account_name"] == "acc"
    assert displayed["http"]["client_kwargs"]["headers"]["Accept"] == "*/*"
    assert (displayed["sftp"]["username"], displayed["sftp"]["port"]) == ("me", 22)


def test_secrets_among_options_are_blanked_in_any_text():
    text = redact("cannot sign with hunter2 (AKIDEXAMPLE, 48151623) for acc at http://h:9000", OPTIONS)

    assert text == "cannot sign with *** (***, ***) for acc at http://h:9000"
    assert redact("PUT /x?k=1 and a%2Fb%2Bc", {"thing": "a/b+c"}) == "PUT /x?k=*** and ***"


def test_stored_url_keeps_place_and_drops_query_and_credentials():
    assert query_free("https://me:pw@h/d/a.tar?X-Amz-Signature=s#f") == "https://***@h/d/a.tar"
    assert query_free("s3://key:secret@bucket/a.tar") == "s3://***@bucket/a.tar"
