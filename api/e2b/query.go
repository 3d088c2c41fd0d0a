package e2b

import (
	"encoding/base64"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// pageLimit is how many items a page has at most, and unless asked for fewer.
const pageLimit = 100

// maxMetadataPairs bounds a metadata filter.
const maxMetadataPairs = 64

// parseMetadata reads the value of the query parameter "metadata", already
// decoded once as every parameter is. It holds a query string of its own whose
// keys and values the SDKs encode once more: "a%253Db=c" in the URL arrives
// here as "a%3Db=c" and means {"a=b": "c"}. Clients that leave out that second
// encoding are understood too.
func parseMetadata(s string) (map[string]string, error) {
	if s == "" {
		return nil, nil
	}
	values, err := url.ParseQuery(s)
	if err != nil {
		return nil, invalid("metadata is not a query string: %v", err)
	}
	if len(values) > maxMetadataPairs {
		return nil, invalid("metadata has %d keys, at most %d are possible", len(values), maxMetadataPairs)
	}
	m := make(map[string]string, len(values))
	for k, v := range values {
		m[unescapeOnce(k)] = unescapeOnce(v[0])
	}
	return m, nil
}

// unescapeOnce undoes encodeURIComponent where s is its output.
func unescapeOnce(s string) string {
	if u, err := url.PathUnescape(s); err == nil {
		return u
	}
	return s
}

// parseStates reads the "state" parameter, given as a list with commas, as
// repeated parameters, or both. None means all that a client can see.
func parseStates(params []string) ([]sandbox.State, error) {
	var states []sandbox.State
	for _, p := range params {
		for s := range strings.SplitSeq(p, ",") {
			switch st := sandbox.State(s); st {
			case sandbox.Running, sandbox.Paused:
				if !slices.Contains(states, st) {
					states = append(states, st)
				}
			case "":
			default:
				return nil, invalid("state %q is neither running nor paused", s)
			}
		}
	}
	if states == nil {
		states = []sandbox.State{sandbox.Running, sandbox.Paused}
	}
	return states, nil
}

// parseLimit reads the "limit" of a page.
func parseLimit(s string) (int, error) {
	if s == "" {
		return pageLimit, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > pageLimit {
		return 0, invalid("limit must be between 1 and %d", pageLimit)
	}
	return n, nil
}

// cursor names the last item of a page: the next one begins after it, whatever
// is created or removed meanwhile.
type cursor struct {
	at time.Time
	id string
}

func (c cursor) String() string {
	return base64.RawURLEncoding.EncodeToString([]byte(strconv.FormatInt(c.at.UnixNano(), 10) + "_" + c.id))
}

// parseCursor reads a "nextToken"; the empty one begins at the start.
func parseCursor(s string) (*cursor, error) {
	if s == "" {
		return nil, nil
	}
	raw, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		return nil, invalid("nextToken was not made here")
	}
	at, id, ok := strings.Cut(string(raw), "_")
	ns, err := strconv.ParseInt(at, 10, 64)
	if !ok || err != nil || id == "" {
		return nil, invalid("nextToken was not made here")
	}
	return &cursor{at: time.Unix(0, ns), id: id}, nil
}

// compare orders cursors by time, then by ID.
func (c cursor) compare(d cursor) int {
	if n := c.at.Compare(d.at); n != 0 {
		return n
	}
	return strings.Compare(c.id, d.id)
}

// page sorts items by their cursors (newest first unless ascending) and cuts
// out the page that begins after the given one. The token is empty on the last
// page.
func page[T any](items []T, key func(T) cursor, after *cursor, limit int, ascending bool) (part []T, token string) {
	sign := -1
	if ascending {
		sign = 1
	}
	slices.SortFunc(items, func(a, b T) int { return sign * key(a).compare(key(b)) })
	if after != nil {
		first := slices.IndexFunc(items, func(t T) bool { return sign*key(t).compare(*after) > 0 })
		if first < 0 {
			first = len(items)
		}
		items = items[first:]
	}
	if len(items) > limit {
		items = items[:limit]
		token = key(items[limit-1]).String()
	}
	return items, token
}

// listQuery is what GET /v2/sandboxes was asked for.
type listQuery struct {
	filter    node.Filter
	since     time.Time // zero: from the beginning
	after     *cursor
	limit     int
	ascending bool
}

// parseListQuery reads the parameters of GET /v2/sandboxes, all but
// "template", whose name only the node can resolve.
func parseListQuery(q url.Values, team string) (listQuery, error) {
	lq := listQuery{filter: node.Filter{Team: team}}
	var err error
	if lq.filter.Metadata, err = parseMetadata(q.Get("metadata")); err != nil {
		return lq, err
	}
	if lq.filter.States, err = parseStates(q["state"]); err != nil {
		return lq, err
	}
	if lq.limit, err = parseLimit(q.Get("limit")); err != nil {
		return lq, err
	}
	if lq.after, err = parseCursor(q.Get("nextToken")); err != nil {
		return lq, err
	}
	switch q.Get("order") {
	case "", "desc":
	case "asc":
		lq.ascending = true
	default:
		return lq, invalid("order must be asc or desc")
	}
	if s := q.Get("startedAfter"); s != "" {
		if lq.since, err = time.Parse(time.RFC3339Nano, s); err != nil {
			return lq, invalid("startedAfter is not a time in RFC 3339: %q", s)
		}
	}
	return lq, nil
}

// parseInterval reads "start" and "end", given in units of a second or a
// millisecond. The zero times mean without bound.
func parseInterval(q url.Values, unit time.Duration) (start, end time.Time, err error) {
	if start, err = parseMoment(q.Get("start"), unit); err != nil {
		return start, end, err
	}
	if end, err = parseMoment(q.Get("end"), unit); err != nil {
		return start, end, err
	}
	if !start.IsZero() && !end.IsZero() && end.Before(start) {
		return start, end, invalid("end is before start")
	}
	return start, end, nil
}

func parseMoment(s string, unit time.Duration) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	const maxSeconds = 1 << 33 // the year 2242; keeps nanoseconds within int64
	if err != nil || n < 0 || n > maxSeconds*int64(time.Second/unit) {
		return time.Time{}, invalid("%q is not a Unix time", s)
	}
	return time.Unix(0, 0).Add(time.Duration(n) * unit), nil
}
