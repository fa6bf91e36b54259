# Makes a script safe that calls terraform or tofu: everything that it starts finds tf under those names.
#
#     . /usr/share/tf/tf.sh
#
# For any POSIX shell; also printed by `tf locks shell-init sh`, where nobody knows in which directory this file lies.
#
# It makes a directory with links named terraform and tofu, puts it first on PATH, and at the script's exit takes it away
# again and finishes what runs left that were killed together with their tf (`tf locks recover`, on stderr). The script's
# exit status stays as it is, and what it had set as its EXIT trap is kept. A script that sets one later calls _tf_exit
# in it. What ends a shell without its EXIT trap (KILL, exec, in dash any signal) leaves that directory in TMPDIR: two
# links, and nothing else.
#
# shellcheck shell=sh

_tf_program=tf

# Takes away what was made. Gives the status that it found.
_tf_exit() {
    _tf_status=$?
    if [ -n "${_tf_shim-}" ] && [ -d "$_tf_shim" ]; then
        "$_tf_program" locks shim --remove "$_tf_shim" >/dev/null || :
        rmdir -- "$_tf_shim" || :
        "$_tf_program" locks recover >&2 || :
    fi
    return "$_tf_status"
}

# The action of the script's own EXIT trap, if it has one: from what `trap` prints, commands that set the traps again, EXIT
# first (POSIX). The first of them becomes our positional parameters; any other sets what is set.
# shellcheck disable=SC2119,SC2120 # Nobody passes them: `set` does.
_tf_read_trap() {
    _tf_earlier=
    case $_tf_traps in
    "trap -- "*)
        eval "set -- ${_tf_traps#trap -- }"
        if [ "${2-}" = EXIT ]; then _tf_earlier=$1; fi
        ;;
    esac
}

_tf_begin() {
    if ! command -v "$_tf_program" >/dev/null; then
        echo "tf.sh: there is no tf on PATH, so terraform would run without it (PATH is ${PATH-not set})" >&2
        return 127
    fi
    _tf_shim=$(mktemp -d "${TMPDIR:-/tmp}/tf-shim.XXXXXXXX") || return 1
    if ! "$_tf_program" locks shim "$_tf_shim" >/dev/null; then
        rmdir -- "$_tf_shim"
        _tf_shim=
        return 1
    fi
    PATH=$_tf_shim:$PATH
    export PATH
}

if [ -z "${_tf_shim-}" ]; then
    _tf_begin
    if [ -n "${_tf_shim-}" ]; then
        # Here and in no function, where zsh has traps of its own; and into a file, because a subshell has none.
        trap >"$_tf_shim/traps"
        _tf_traps=$(cat "$_tf_shim/traps")
        rm -f -- "$_tf_shim/traps"
        _tf_read_trap
        # This file may be read in a function. In zsh a trap on EXIT is then that function's, unless it is set the POSIX
        # way; and if the script has set one the other way, that stays, and we are called by the other list of zsh's.
        _tf_in_function=
        if [ -n "${ZSH_VERSION-}" ]; then eval '[[ ${#funcstack} -gt 1 && ! -o posixtraps ]] && _tf_in_function=1 || :'; fi
        if [ -n "$_tf_in_function" ]; then eval 'zshexit_functions+=(_tf_exit); setopt posixtraps'; fi
        # Both ways the same, because only so the earlier trap sees in `$?` what it would have seen.
        trap 'if _tf_exit; then eval "$_tf_earlier"; else eval "$_tf_earlier"; fi' EXIT
        if [ -n "$_tf_in_function" ]; then eval 'unsetopt posixtraps'; fi
    else
        false
    fi
fi
