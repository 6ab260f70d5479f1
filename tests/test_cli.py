"The command as a user meets it"
import signal, subprocess, sys, time

import pytest

COMMAND = [sys.executable, '-c', 'import sys; from drdna.cli import main; sys.exit(main())']
def drdna(*args, **kw): return subprocess.run([*COMMAND, *args], capture_output=True, text=True, **kw)

@pytest.mark.parametrize('args, says', [
    (['reproduce', '--fpr', '0.0001'], 'needs at least 9999 calibration inputs, got 1000'),
    (['reproduce', '--fpr', '2'], 'lies between 0 and 1'),
    (['reproduce', '--bins', '0'], '--bins 0'),
    (['reproduce', '--device', 'abacus'], '--device abacus'),
    (['reproduce', '--out', '/proc/1/nowhere'], '/proc/1/nowhere'),
    (['reproduce', '--faults', 'many'], "invalid int value: 'many'"),
    (['conquer'], "invalid choice: 'conquer'"),
])
def test_a_bad_option_is_one_line_and_exit_code_2(args, says, tmp_path):
    r = drdna(*args, cwd=tmp_path)
    assert r.returncode == 2 and says in r.stderr.splitlines()[-1]
    assert 'Traceback' not in r.stderr and not list(tmp_path.iterdir())

def test_ctrl_c_leaves_no_half_report(tmp_path):
    p = subprocess.Popen([*COMMAND, 'reproduce', '--out', str(tmp_path / 'r')], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # a shell's background job ignores it, and so would its children
    deadline = time.time() + 120
    while not (tmp_path / 'r').exists() and time.time() < deadline: time.sleep(.1)
    time.sleep(2)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and b'interrupted' in err and not (tmp_path / 'r').exists()
