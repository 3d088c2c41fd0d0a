package guest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"

	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/sandbox"
)

// Logs passes log entries after since to each, oldest first: those that are
// kept and, if follow is set, those to come until ctx ends, which is an error.
// It stops early with the error that each returns.
func (c *Client) Logs(ctx context.Context, since uint64, follow bool, each func(wire.LogEntry) error) error {
	query := url.Values{"since": {strconv.FormatUint(since, 10)}, "follow": {strconv.FormatBool(follow)}}
	res, err := c.call(ctx, "guest.Logs", http.MethodGet, "/logs", query, nil, nil)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	return readLogs(res.Body, each)
}

// readLogs reads log entries until the stream ends.
func readLogs(r io.Reader, each func(wire.LogEntry) error) error {
	const maxLine = 1 << 20 // bytes: the guest is not trusted to end its lines
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		var e wire.LogEntry
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return sandbox.E("guest.Logs", sandbox.Internal, "", err)
		}
		if err := each(e); err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil {
		return transportError("guest.Logs", err)
	}
	return nil
}

// errFound ends a reading of the log.
var errFound = errors.New("found")

// Exit looks in the log for how the process with a tag and a PID ended, and
// waits for it until ctx ends. A PID of 0 means any. It reports false when it
// does not find out.
func (c *Client) Exit(ctx context.Context, tag string, pid int) (Result, bool) {
	var result Result
	err := c.Logs(ctx, 0, true, func(e wire.LogEntry) error {
		if e.Event != wire.LogExit || e.Tag != tag || pid != 0 && e.PID != pid || e.ExitCode == nil {
			return nil
		}
		result = newResult(*e.ExitCode >= 0, *e.ExitCode, e.Status, e.Error)
		return errFound
	})
	return result, errors.Is(err, errFound)
}
