# Makes a script safe that calls terraform or tofu: everything that it starts finds tf under those names.
#
#     . /usr/share/tf/tf.sh
#
# For any POSIX shell; also printed by `tf locks shell-init sh`, where nobody knows in which directory this file lies.
#
# It makes a directory with links named terraform and tofu (each where there is one already), puts it first on PATH, and at
# the script's exit takes it away again and finishes what runs left that were killed together with their tf (`tf locks
# recover`, on stderr). The script's exit status stays as it is, and what it had set as its EXIT trap is kept. A script that
# sets one later calls _tf_exit in it; in a subshell it does not. What runs on in the background when the script has ended
# finds terraform itself again. What ends a shell without its EXIT trap (KILL, exec, in most shells a signal) leaves that
# directory in TMPDIR: two links, and nothing else.
#
# shellcheck shell=sh

_tf_program=tf

# Takes away what was made. Gives the status that it found.
_tf_exit() {
    _tf_status=$?
    # zsh calls what is in zshexit_functions in each subshell that exits.
    if [ "${ZSH_SUBSHELL:-0}" -gt "${_tf_subshell:-0}" ]; then return "$_tf_status"; fi
    if [ -n "${_tf_shim-}" ] && [ -d "$_tf_shim" ]; then
        "$_tf_program" locks shim --remove "$_tf_shim" >/dev/null || :
        rmdir -- "$_tf_shim" || :
        "$_tf_program" locks recover >&2 || :
    fi
    return "$_tf_status"
}

# The action of the script's own EXIT trap, if it has one: from what `trap` prints, commands that set the traps again, EXIT
# first. The first of them becomes our positional parameters; any other sets what is set. ksh93 prints it last, and by itself
# when it is asked for it.
# shellcheck disable=SC2119,SC2120 # Nobody passes them: `set` does.
_tf_read_trap() {
    _tf_earlier=
    case ${KSH_VERSION-} in
    Version*)
        # shellcheck disable=SC3045 # ksh93 alone comes here.
        _tf_earlier=$(trap -p EXIT)
        return 0
        ;;
    esac
    case $_tf_traps in
    "trap -- "*)
        eval "set -- ${_tf_traps#trap -- }"
        if [ "${2-}" = EXIT ]; then _tf_earlier=$1; fi
        ;;
    esac
}

_tf_fail() {
    echo "tf.sh: $1: terraform would run without tf" >&2
    if [ -n "${_tf_shim-}" ]; then
        rm -f -- "$_tf_shim/terraform" "$_tf_shim/tofu"
        rmdir -- "$_tf_shim"
        _tf_shim=
    fi
    return "$2"
}

# Sets _tf_found to what a command name stands for, or to nothing. ksh93 quotes a path that a shell would take apart.
_tf_look_up() {
    _tf_found=$(command -v "$1") || {
        _tf_found=
        return 1
    }
    case ${KSH_VERSION-} in
    Version*)
        case $_tf_found in
        "'"* | "\$'"*) eval "_tf_found=$_tf_found" ;;
        esac
        ;;
    esac
}

_tf_begin() {
    _tf_shim=
    # By its path, should the script set another PATH later.
    _tf_look_up "$_tf_program" || {
        _tf_fail "there is no tf on PATH (PATH is ${PATH-not set})" 127
        return
    }
    case $_tf_found in /*) _tf_program=$_tf_found ;; esac
    # A script may ask which of the two there is.
    _tf_only=
    if ! command -v tofu >/dev/null; then
        _tf_only=terraform
    elif ! command -v terraform >/dev/null; then
        _tf_only=tofu
    fi
    # Absolute, and as the file system knows it: the script may go elsewhere.
    _tf_found=$(cd -- "${TMPDIR:-/tmp}" && pwd -P) && _tf_shim=$(mktemp -d "$_tf_found/tf-shim.XXXXXXXX") || _tf_shim=
    if [ -z "$_tf_shim" ]; then
        _tf_fail "no directory can be made in ${TMPDIR:-/tmp}" 1
        return
    fi
    "$_tf_program" locks shim ${_tf_only:+--only} ${_tf_only:+"$_tf_only"} "$_tf_shim" >/dev/null || {
        _tf_fail "no links can be made in $_tf_shim" 1
        return
    }
    PATH=$_tf_shim:$PATH
    export PATH
    _tf_subshell=${ZSH_SUBSHELL:-0}
    # A directory with a ":" in its name is two on PATH.
    _tf_look_up "${_tf_only:-terraform}" || :
    if [ "$_tf_found" != "$_tf_shim/${_tf_only:-terraform}" ]; then
        _tf_fail "$_tf_shim is not found first on PATH" 1
        return
    fi
}

# Whether it was done already, in this shell or in one that has handed its variables down.
_tf_is_begun() {
    [ -n "${_tf_shim-}" ] && [ -d "$_tf_shim" ] || return 1
    case $PATH in "$_tf_shim":*) return 0 ;; esac
    return 1
}

if ! _tf_is_begun; then
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
        # shellcheck disable=SC3054,SC3044 # zsh alone comes so far.
        if [ -n "${ZSH_VERSION-}" ] && [ -n "${funcstack+x}" ] && [ "${#funcstack[@]}" -gt 1 ]; then
            eval 'zshexit_functions+=(_tf_exit); [[ -o posixtraps ]] || _tf_in_function=1'
            setopt posixtraps
        fi
        # Both ways the same, because only so the earlier trap sees in `$?` what it would have seen.
        trap 'if _tf_exit; then eval "$_tf_earlier"; else eval "$_tf_earlier"; fi' EXIT
        if [ -n "$_tf_in_function" ]; then eval 'unsetopt posixtraps'; fi
    else
        false
    fi
fi
