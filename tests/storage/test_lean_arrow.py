"""pyarrow leaves pandas alone in Raylift's own processes, and gives data frames all the same."""

import subprocess
import sys

PROGRAM = """
import sys
import pyarrow as pa
from storage.lean_arrow import forget_pandas

forget_pandas()
pa.array([1]), pa.schema([("a", pa.int64())]).empty_table(), pa.table({"a": [1]}).take([0])
print("pandas" in sys.modules, "NoPandas" in str(sys.meta_path))
frame = pa.table({"a": [1, 2]}).to_pandas()
import pandas
print(type(frame) is pandas.DataFrame, pa.array(pandas.Series([1.0, None])).null_count, pa.Table.from_pandas(frame).num_rows)
forget_pandas()
print(pa.array(pandas.Series([1.0, None])).null_count)
"""


def test_pandas_is_imported_where_a_data_frame_is_made_and_not_before():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["False False", "True 1 2", "1"]
