
# The program that is asked. What `tf locks shell-init` prints says its path, where it is not on PATH.
typeset -g _tf_program=tf

# Completes tf, and terraform where that is an alias of it: terraform's own words as terraform says them, and `locks`.
_tf_or_terraform() {
    local -i word=2
    while (( word < CURRENT )) && [[ $words[word] == -chdir=* ]]; do (( word++ )); done
    if (( word < CURRENT )) && [[ $words[word] == locks ]]; then
        words=($words[1] "${(@)words[word,-1]}")
        (( CURRENT -= word - 2 ))
        _tf "$@"
        return
    fi
    # Terraform is told as bash tells it (`complete -C`), and looks at nothing but these two.
    local -x COMP_LINE="${(j: :)${(@)words[1,CURRENT-1]}} $PREFIX"
    local -x COMP_POINT=${#COMP_LINE}
    local -a offered whole begun
    offered=("${(@f)$("$_tf_program" 2>/dev/null)}")
    (( word == CURRENT )) && offered+=(locks)
    # A value or a name in a directory follows at once.
    whole=("${(@)offered:#*[=/]}")
    begun=("${(@M)offered:#*[=/]}")
    local ret=1
    compadd -a -- whole && ret=0
    compadd -S '' -a -- begun && ret=0
    return ret
}

# Has it complete a command. In a start-up file that may stand above compinit: then before the first prompt.
_tf_complete() {
    emulate -L zsh
    if (( $+functions[compdef] )); then
        compdef _tf_or_terraform $1
        return
    fi
    typeset -ga _tf_to_complete
    _tf_to_complete+=($1)
    autoload -Uz add-zsh-hook
    add-zsh-hook precmd _tf_before_the_prompt
}

_tf_before_the_prompt() {
    emulate -L zsh
    add-zsh-hook -d precmd _tf_before_the_prompt
    (( $+functions[compdef] )) && compdef _tf_or_terraform $_tf_to_complete
    unset _tf_to_complete
}

_tf_complete tf
# The first call, from a directory of completions: zsh has read this file as the body of a function.
if [[ $funcstack[1] == _tf ]]; then _tf_or_terraform "$@"; fi
