
# The program that is asked. What `tf locks shell-init` prints says its path, where it is not on PATH.
_tf_program=tf

# Completes tf, and terraform where that is an alias of it: terraform's own words as terraform says them, and `locks`.
_tf_or_terraform() {
    local word=1
    # Bash makes three words of -chdir=DIR, because it breaks words at "=" as well.
    while [[ $word -lt $COMP_CWORD && ${COMP_WORDS[word]} == -chdir* ]]; do
        if [[ ${COMP_WORDS[word + 1]} == = ]]; then word=$((word + 3)); else word=$((word + 1)); fi
    done
    if [[ $word -lt $COMP_CWORD && ${COMP_WORDS[word]} == locks ]]; then
        COMP_WORDS=("$1" "${COMP_WORDS[@]:word}")
        COMP_CWORD=$((COMP_CWORD - word + 1))
        _tf "$1" "$2" "$3"
        return
    fi
    # Terraform is told as a shell tells it (`complete -C`), and looks at nothing but these two.
    local IFS=$'\n'
    # shellcheck disable=SC2207 # mapfile came with bash 4, and macOS has 3.2.
    COMPREPLY=($(COMP_LINE=$COMP_LINE COMP_POINT=$COMP_POINT "$_tf_program" 2>/dev/null))
    if [[ $word -eq $COMP_CWORD && locks == "$2"* ]]; then
        COMPREPLY+=(locks)
    fi
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=/] && ${BASH_VERSINFO[0]} -ge 4 ]]; then
        compopt -o nospace
    fi
}

complete -F _tf_or_terraform tf
