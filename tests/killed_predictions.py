"""Predict in child processes that are killed; run by test_prediction_resume.

Usage: python killed_predictions.py RUN DICOM ORDERS, with ORDERS a JSON list of [end, out]: `end`
is null, the name of a fail point, or a number of seconds after which the child is killed. Prints
the list of exit codes.
"""

import contextlib
import io
import json
import os
import signal
import sys
import time

import cv2

from ich_keras.errors import IchError

# Forked children need not import again. Nothing has been computed yet, so no thread is lost.
from ich_keras.models import classifier  # noqa: F401
from ich_keras.prediction import predict_folder


def predict(run, dicom, end, out):
    cv2.setNumThreads(1)
    if isinstance(end, str):
        os.environ["ICH_FAIL_AT"] = end
    try:
        predict_folder(run, dicom, out, batch_size=4)
    except IchError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def main():
    run, dicom, orders = sys.argv[1:]
    codes = []
    for end, out in json.loads(orders):
        child = os.fork()
        if child == 0:
            code = 99
            with contextlib.suppress(BaseException), contextlib.redirect_stdout(io.StringIO()):
                code = predict(run, dicom, end, out)
            os._exit(code)
        if isinstance(end, float):
            time.sleep(end)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        codes.append(os.waitstatus_to_exitcode(status))
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
