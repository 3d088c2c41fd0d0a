package carry

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"sync"

	"github.com/atoll-run/atoll/peer"
	"github.com/atoll-run/atoll/sandbox"
)

// Pull has a peer send something to this node. report may be nil.
func (c *Carrier) Pull(ctx context.Context, kind Kind, ref, from string, report func(Progress)) (Result, error) {
	const op = "carry.Pull"
	if from == StoreName {
		return c.fromStore(ctx, kind, ref, report)
	}
	p, err := c.group.Find(from)
	if err != nil {
		return Result{}, err
	}
	if res, done, err := c.pullNear(ctx, kind, ref, p, report); done || err != nil {
		return res, err
	}
	end, err := c.group.Turn(ctx, p)
	if err != nil {
		return Result{}, err
	}
	defer end()
	l, err := c.group.Link(ctx, p)
	if err != nil {
		return Result{}, err
	}
	body, err := json.Marshal(pullRequest{kind, ref})
	if err != nil {
		return Result{}, sandbox.E(op, sandbox.Invalid, ref, err)
	}
	resp, err := l.Do(ctx, http.MethodPost, "/carry/v1/pulls", bytes.NewReader(body))
	if err != nil {
		return Result{}, err
	}
	defer resp.Body.Close()
	for dec := json.NewDecoder(resp.Body); ; {
		var line pullLine
		if err := dec.Decode(&line); err != nil {
			return Result{}, fail(op, ref, sandbox.Unavailable, fmt.Errorf("the node hung up: %w", err))
		}
		switch {
		case line.Error != nil:
			return Result{}, &sandbox.Err{Op: op, Kind: line.Error.Kind, Subject: ref, Err: fmt.Errorf("%s", line.Error.Detail), Hint: line.Error.Hint}
		case line.Result != nil:
			return *line.Result, nil
		case line.Progress != nil && report != nil:
			report(*line.Progress)
		}
	}
}

type pullRequest struct {
	Kind Kind   `json:"kind"`
	Ref  string `json:"ref"`
}

// pullLine is one line of the answer to a pull: one of its fields.
type pullLine struct {
	Progress *Progress  `json:"progress,omitempty"`
	Result   *Result    `json:"result,omitempty"`
	Error    *pullError `json:"error,omitempty"`
}

type pullError struct {
	Kind   sandbox.Kind `json:"kind"`
	Detail string       `json:"detail"`
	Hint   string       `json:"hint,omitempty"`
}

// servePull pushes what a peer asks for, over the connections that it turned round.
func (c *Carrier) servePull(w http.ResponseWriter, r *http.Request) {
	var req pullRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10)).Decode(&req); err != nil {
		peer.Fail(w, sandbox.E("carry.Pull", sandbox.Invalid, "", err))
		return
	}
	it, err := c.find(r.Context(), req.Kind, req.Ref)
	if err != nil {
		peer.Fail(w, err)
		return
	}
	var mu sync.Mutex
	enc, rc := json.NewEncoder(w), http.NewResponseController(w)
	say := func(line pullLine) {
		mu.Lock()
		defer mu.Unlock()
		_ = enc.Encode(line) // a peer that has gone ends the request's context
		_ = rc.Flush()
	}
	from := peer.From(r.Context())
	res, err := c.push(r.Context(), it, func(ctx context.Context) (*peer.Link, error) { return c.group.Turned(ctx, from) },
		func(p Progress) { say(pullLine{Progress: &p}) })
	if err != nil {
		say(pullLine{Error: &pullError{sandbox.KindOf(err), err.Error(), sandbox.HintOf(err)}})
		return
	}
	say(pullLine{Result: &res})
}
