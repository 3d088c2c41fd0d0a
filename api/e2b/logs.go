package e2b

import (
	"context"
	"encoding/json"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tenant"
)

// maxLogs is how many log entries one answer has at most, and unless asked for
// fewer.
const maxLogs = 1000

// logEntry is one entry of a sandbox's log.
type logEntry struct {
	Timestamp time.Time         `json:"timestamp"`
	Level     string            `json:"level"`
	Message   string            `json:"message"`
	Fields    map[string]string `json:"fields"`
}

// logLine is the older form: the entry as a line of JSON.
type logLine struct {
	Timestamp time.Time `json:"timestamp"`
	Line      string    `json:"line"`
}

// rank orders the names of log levels; an unknown one ranks as info.
func rank(level string) int {
	switch level {
	case "debug":
		return 0
	case "warn":
		return 2
	case "error":
		return 3
	}
	return 1
}

// logQuery narrows a log.
type logQuery struct {
	from, until time.Time // both inclusive; zero: unbounded
	level       string    // at least; empty: all
	search      string    // in the message
	limit       int
	backward    bool // newest first
}

// parseLogQuery reads the parameters of the newer form. The cursor is where to
// go on, in the direction of reading.
func parseLogQuery(q url.Values) (logQuery, error) {
	lq := logQuery{level: q.Get("level"), search: q.Get("search")}
	at, err := parseMoment(q.Get("cursor"), time.Millisecond)
	if err != nil {
		return lq, err
	}
	switch q.Get("direction") {
	case "", "forward":
		lq.from = at
	case "backward":
		lq.backward, lq.until = true, at
	default:
		return lq, invalid("direction must be forward or backward")
	}
	switch lq.level {
	case "", "debug", "info", "warn", "error":
	default:
		return lq, invalid("level must be debug, info, warn or error")
	}
	lq.limit, err = parseLogLimit(q.Get("limit"))
	return lq, err
}

func parseLogLimit(s string) (int, error) {
	if s == "" {
		return maxLogs, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 || n > math.MaxInt32 {
		return 0, invalid("limit must be a number")
	}
	return min(n, maxLogs), nil
}

// pick applies the query to entries, oldest first.
func (q logQuery) pick(all []logEntry) []logEntry {
	out := make([]logEntry, 0, min(len(all), q.limit))
	for _, e := range all {
		switch {
		case !q.from.IsZero() && e.Timestamp.Before(q.from),
			!q.until.IsZero() && e.Timestamp.After(q.until),
			q.level != "" && rank(e.Level) < rank(q.level),
			!strings.Contains(e.Message, q.search):
		default:
			out = append(out, e)
		}
	}
	if q.backward {
		slices.Reverse(out)
	}
	return out[:min(len(out), q.limit)]
}

func (a *api) logsV2(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	q, err := parseLogQuery(r.URL.Query())
	if err != nil {
		a.fail(w, r, err)
		return
	}
	a.onSandbox(w, r, key, func(sb node.Sandbox) error {
		writeJSON(w, http.StatusOK, struct {
			Logs []logEntry `json:"logs"`
		}{q.pick(a.sandboxLog(r.Context(), sb))})
		return nil
	})
}

func (a *api) logsV1(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	from, err := parseMoment(r.URL.Query().Get("start"), time.Millisecond)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	limit, err := parseLogLimit(r.URL.Query().Get("limit"))
	if err != nil {
		a.fail(w, r, err)
		return
	}
	a.onSandbox(w, r, key, func(sb node.Sandbox) error {
		entries := logQuery{from: from, limit: limit}.pick(a.sandboxLog(r.Context(), sb))
		lines := make([]logLine, 0, len(entries))
		for _, e := range entries {
			lines = append(lines, e.line())
		}
		writeJSON(w, http.StatusOK, struct {
			Logs    []logLine  `json:"logs"`
			Entries []logEntry `json:"logEntries"`
		}{lines, entries})
		return nil
	})
}

// line flattens the entry into one object, as E2B's command line reads it.
func (e logEntry) line() logLine {
	m := make(map[string]string, len(e.Fields)+2)
	for k, v := range e.Fields {
		m[k] = v
	}
	m["level"], m["message"] = e.Level, e.Message
	text, err := json.Marshal(m)
	if err != nil { // strings always marshal
		text = []byte("{}")
	}
	return logLine{Timestamp: e.Timestamp, Line: string(text)}
}

// sandboxLog is what is known of a sandbox's past, oldest first: what the node
// saw of it, and what its guest agent kept of processes and their output. A
// paused sandbox is not woken to be asked.
func (a *api) sandboxLog(ctx context.Context, sb node.Sandbox) []logEntry {
	var all []logEntry
	for _, e := range a.pastEvents(ctx, sb.ID) {
		all = append(all, entryOfEvent(e))
	}
	if sb.State == sandbox.Running {
		kept, err := a.guestLog(ctx, sb.ID)
		if err != nil {
			a.log.Debug("reading a guest's log", "sandbox", sb.ID, "error", err)
		}
		for _, e := range kept {
			all = append(all, entryOfGuest(e))
		}
	}
	slices.SortStableFunc(all, func(a, b logEntry) int { return a.Timestamp.Compare(b.Timestamp) })
	return all
}

// pastEvents are the node's events about a sandbox that it still keeps.
func (a *api) pastEvents(ctx context.Context, id string) []sandbox.Event {
	last := a.node.Info().LastEvent
	if last == 0 {
		return nil
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var out []sandbox.Event
	for e := range a.node.Events(ctx, 0) {
		if e.Sandbox == id && e.Seq <= last {
			out = append(out, e)
		}
		if e.Seq >= last {
			break
		}
	}
	return out
}

func entryOfEvent(e sandbox.Event) logEntry {
	level := "info"
	if e.Kind != sandbox.EventState || e.State == sandbox.Error {
		level = "warn"
	}
	message := "sandbox is " + string(e.State)
	if e.Kind != sandbox.EventState {
		message = "sandbox " + string(e.Kind)
	}
	fields := map[string]string{"logger": "node", "event": string(e.Kind)}
	if e.Reason != "" {
		fields["reason"] = e.Reason
	}
	return logEntry{Timestamp: e.Time, Level: level, Message: message, Fields: fields}
}

func entryOfGuest(e wire.LogEntry) logEntry {
	fields := map[string]string{"logger": "process", "event": e.Event, "pid": strconv.Itoa(e.PID)}
	if e.Tag != "" {
		fields["tag"] = e.Tag
	}
	out := logEntry{Timestamp: e.Time, Level: "info", Fields: fields}
	switch e.Event {
	case wire.LogStart:
		out.Message = "process started"
		fields["user"], fields["cmd"] = e.User, strings.Join(e.Cmd, " ")
	case wire.LogExit:
		out.Message = "process ended"
		fields["status"] = e.Status
		if e.ExitCode != nil {
			fields["exitCode"] = strconv.Itoa(*e.ExitCode)
		}
		if e.Error != "" {
			out.Level, fields["error"] = "warn", e.Error
		}
	case wire.LogStderr:
		out.Level, out.Message = "warn", e.Line
	default:
		out.Message = e.Line
	}
	return out
}

// guestLogTime bounds asking a guest for its log.
const guestLogTime = 5 * time.Second

// guestLog reads what the guest agent has kept.
func (a *api) guestLog(ctx context.Context, id string) ([]wire.LogEntry, error) {
	ctx, stop := context.WithTimeout(ctx, guestLogTime)
	defer stop()
	client, err := a.node.Guest(ctx, id)
	if err != nil {
		return nil, err
	}
	var out []wire.LogEntry
	err = client.Logs(ctx, 0, false, func(e wire.LogEntry) error {
		out = append(out, e)
		return nil
	})
	return out, err
}
