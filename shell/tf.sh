# Lets a script run tf whenever it, or a program that it starts, calls terraform or tofu.
#
#     . /usr/share/tf/tf.sh
#
# Works in any POSIX shell. `tf locks shell-init sh` prints this file, for scripts that do not know its path.
#
# This file creates a directory with links to tf, named terraform and tofu, and puts that directory first on PATH. If
# only one of the two programs is on PATH, it creates only that link. When the script exits, it removes the directory
# and runs `tf locks recover` (with its output on stderr), which releases the locks of runs that were killed together
# with their tf.
#
# The script's exit status and its earlier EXIT trap stay in effect. A script that sets an EXIT trap after it has read
# this file must call _tf_exit in that trap, but not in the EXIT trap of a subshell.
#
# A background process that continues after the script has exited finds terraform itself again. If the shell exits
# without running its EXIT trap (KILL, exec, in most shells any signal), the directory with its two links stays in
# TMPDIR.
#
# shellcheck shell=sh

_tf_program=tf

# Removes the links and their directory, and recovers killed runs. Returns the exit status from before the call.
_tf_exit() {
    _tf_status=$?
    # zsh also calls the functions in zshexit_functions when a subshell exits.
    if [ "${ZSH_SUBSHELL:-0}" -gt "${_tf_subshell:-0}" ]; then return "$_tf_status"; fi
    if [ -n "${_tf_shim-}" ] && [ -d "$_tf_shim" ]; then
        "$_tf_program" locks shim --remove "$_tf_shim" >/dev/null || :
        if [ -d "$_tf_shim" ]; then rmdir -- "$_tf_shim" || :; fi
        "$_tf_program" locks recover >&2 || :
    fi
    return "$_tf_status"
}

# Sets _tf_earlier to the action of the script's own EXIT trap, or to nothing if there is none. `trap` prints commands
# that set the current traps, and the one for EXIT is first. The eval turns the first command into positional
# parameters; any other command only sets a trap that is set already. ksh93 prints the EXIT trap last, but `trap -p
# EXIT` prints only its action.
# shellcheck disable=SC2119,SC2120 # The parameters come from `set`, not from a caller.
_tf_read_trap() {
    _tf_earlier=
    case ${KSH_VERSION-} in
    Version*)
        # shellcheck disable=SC3045 # Only ksh93 executes this line.
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

# Sets _tf_found to the output of `command -v` for a command name, or to nothing if there is no such command. ksh93
# quotes a path that contains special characters, so the quotes are removed.
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
    # Store the path of tf, because the script may change PATH later.
    _tf_look_up "$_tf_program" || {
        _tf_fail "there is no tf on PATH (PATH is ${PATH-not set})" 127
        return
    }
    case $_tf_found in /*) _tf_program=$_tf_found ;; esac
    # If only one of the programs exists, create only that link: a script may check which of them exists.
    _tf_only=
    if ! command -v tofu >/dev/null; then
        _tf_only=terraform
    elif ! command -v terraform >/dev/null; then
        _tf_only=tofu
    fi
    # An absolute path without symbolic links, because the script may change its directory.
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
    # Check the result: a directory with a ":" in its name counts as two directories on PATH.
    _tf_look_up "${_tf_only:-terraform}" || :
    if [ "$_tf_found" != "$_tf_shim/${_tf_only:-terraform}" ]; then
        _tf_fail "$_tf_shim is not found first on PATH" 1
        return
    fi
}

# Returns 0 if the links are already first on PATH, set by this shell or by a parent whose variables it inherited.
_tf_is_begun() {
    [ -n "${_tf_shim-}" ] && [ -d "$_tf_shim" ] || return 1
    case $PATH in "$_tf_shim":*) return 0 ;; esac
    return 1
}

if ! _tf_is_begun; then
    _tf_begin
    if [ -n "${_tf_shim-}" ]; then
        # Not in a function, because zsh has separate traps there. Written to a file, because a command substitution
        # runs in a subshell, which has no traps.
        trap >"$_tf_shim/traps"
        _tf_traps=$(cat "$_tf_shim/traps")
        rm -f -- "$_tf_shim/traps"
        _tf_read_trap
        # This file may be read in a function. In zsh, a trap on EXIT then belongs to that function, unless the option
        # posixtraps is set. So that option is set for a moment. If the script has set an EXIT trap without it, that
        # trap stays, and zsh calls _tf_exit through zshexit_functions.
        _tf_in_function=
        # shellcheck disable=SC3054,SC3044 # Only zsh executes these lines.
        if [ -n "${ZSH_VERSION-}" ] && [ -n "${funcstack+x}" ] && [ "${#funcstack[@]}" -gt 1 ]; then
            eval 'zshexit_functions+=(_tf_exit); [[ -o posixtraps ]] || _tf_in_function=1'
            setopt posixtraps
        fi
        # Both branches are the same: this way `$?` in the earlier trap is the script's exit status.
        trap 'if _tf_exit; then eval "$_tf_earlier"; else eval "$_tf_earlier"; fi' EXIT
        if [ -n "$_tf_in_function" ]; then eval 'unsetopt posixtraps'; fi
    else
        false
    fi
fi
