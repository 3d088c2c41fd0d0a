package e2b

import (
	"regexp"
	"strings"
	"sync"
)

// defaultTag is what a name without a tag means.
const defaultTag = "default"

// reference is what clients call templates and snapshots by: "name",
// "name:tag", "team/name:tag", or an ID in the place of the name.
type reference struct {
	team string // empty: the caller's own
	name string
	tag  string // empty: not given
}

var (
	namePattern = lazy(`^[a-z0-9]([a-z0-9_-]{0,126}[a-z0-9_-])?$`)
	tagPattern  = lazy(`^[a-zA-Z0-9_]([a-zA-Z0-9._-]{0,126}[a-zA-Z0-9._-])?$`)
	teamPattern = lazy(`^[a-zA-Z0-9]([a-zA-Z0-9._-]{0,62})?$`)
)

// lazy compiles a pattern when it is first used: this package is linked into
// programs for whose start every millisecond counts.
func lazy(pattern string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(pattern) })
}

// parseReference reads a name. Names are case-insensitive.
func parseReference(s string) (reference, error) {
	var r reference
	rest := s
	if team, name, ok := strings.Cut(rest, "/"); ok {
		if !teamPattern().MatchString(team) {
			return r, invalid("%q is not a name: before the slash stands a team", s)
		}
		r.team, rest = team, name
	}
	name, tag, ok := strings.Cut(rest, ":")
	if ok && !tagPattern().MatchString(tag) {
		return r, invalid("%q is not a name: a tag has letters, digits, '.', '_' and '-'", s)
	}
	r.name, r.tag = strings.ToLower(strings.TrimSpace(name)), tag
	if !namePattern().MatchString(r.name) {
		return r, invalid("%q is not a name: it has lower-case letters, digits, '_' and '-'", s)
	}
	return r, nil
}

// parseTag checks a tag by itself.
func parseTag(s string) (string, error) {
	if !tagPattern().MatchString(s) {
		return "", invalid("%q is not a tag: it has letters, digits, '.', '_' and '-'", s)
	}
	return s, nil
}
