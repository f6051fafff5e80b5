#!/usr/bin/env bash
# What can be said of the code without running it. Every check runs, so that one look shows all there is to mend.

set -uo pipefail
cd "$(dirname "$0")/.." || exit
readonly BIN=.venv/bin
failed=()

check() {
    local name=$1 said
    shift
    if said=$("$@" 2>&1); then
        printf 'ok      %s\n' "$name"
    else
        printf 'FAILED  %s\n%s\n' "$name" "$said"
        failed+=("$name")
    fi
}

# The settings class is the one description of what can be configured; the file is written from it.
env_example() {
    diff --unified --label .env.example --label 'written from service/settings.py' \
        .env.example <("$BIN/python" -m service.settings --env-example) && return
    echo "write it again:  $BIN/python -m service.settings --env-example > .env.example"
    return 1
}

check "formatting" "$BIN/ruff" format --check --quiet --diff .
check "lint" "$BIN/ruff" check --quiet .
check "types" "$BIN/mypy"
check "import contracts" env COLUMNS=120 "$BIN/lint-imports" --no-logo --cache-dir .cache/import-linter
# HOOK: becomes active with the settings.
if [ -e service/settings.py ]; then check ".env.example" env_example; fi

[ ${#failed[@]} -eq 0 ] || { printf 'check: %d failed\n' "${#failed[@]}" && exit 1; }
