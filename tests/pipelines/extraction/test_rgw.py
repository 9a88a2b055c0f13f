"""Opt-in (`make test-rgw`): the pipeline over a real S3 server, Ceph's gateway, with real authentication."""

import json
import threading

import pytest
import s3fs

from jobs.extract import run
from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from storage.paths import Folder
from tests.pipelines.extraction.test_s3 import same_but_sources, tree, upload
from tests.stops import dying_at_task

pytestmark = pytest.mark.rgw


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    from tests.servers.rgw import RgwUnavailable, rgw_server

    try:
        with rgw_server(tmp_path_factory.mktemp("rgw")) as server:
            yield {"key": server.access_key, "secret": server.secret_key, "endpoint_url": server.endpoint}
    except RgwUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def bucket(gateway, request) -> str:
    name = f"bkt-{abs(hash(request.node.name)) % 10**8}"
    s3fs.S3FileSystem(**gateway).mkdir(name)
    return name


def test_of_sixteen_writers_exactly_one_creates(gateway, bucket):
    folder = Folder(f"s3://{bucket}/x", gateway)
    folder.exists("warm")
    won = []
    threads = [threading.Thread(target=lambda i=i: won.append(folder.write_new("k", str(i).encode()))) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(won) == [False] * 15 + [True]


def test_store_on_ceph_has_the_bytes_of_the_local_one_and_continues(gateway, bucket, make_tars, tiny, tmp_path):
    local = tiny(make_tars(count=2, each=10))
    upload(tmp_path / "in", bucket, gateway)
    remote = tiny(
        f"s3://{bucket}/in/s-{{000..001}}.tar", out=f"s3://{bucket}/f.zarr", storage_options=json.dumps({"s3": gateway})
    )
    extract(local, InlineExecutor())
    with dying_at_task(3):
        extract(remote, InlineExecutor())

    summary = extract(remote, InlineExecutor())

    assert (summary.ok, summary.this_run) == (20, 8)
    assert same_but_sources(tree(Folder(local.out)), tree(Folder(remote.out, remote.options)))


def test_wrong_secret_is_a_clear_error_without_the_secret(gateway, bucket, capfd):
    wrong = json.dumps({**gateway, "secret": "not-the-real-secret"})

    code = run(["--data", f"s3://{bucket}/in.tar", "--out", f"s3://{bucket}/o.zarr", "--storage-options", wrong,
                "--model", "test_vit.r160_in1k", "--weights", "random", "--executor", "inline"])  # fmt: skip

    displayed = "".join(capfd.readouterr())
    assert code == 2
    assert "PermissionError" in displayed
    assert "not-the-real-secret" not in displayed
