package e2b

import (
	"cmp"
	"context"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tenant"
)

// Limits of a template's machine.
const (
	maxCPUs     = 64
	minMemoryMB = 128
	maxMemoryMB = 256 << 10
)

// buildRequest is the body of POST /v3/templates.
type buildRequest struct {
	Name     string   `json:"name"`
	Alias    string   `json:"alias"` // the older word for name
	Tags     []string `json:"tags"`
	CPUCount *int     `json:"cpuCount"`
	MemoryMB *int64   `json:"memoryMB"`
	TeamID   string   `json:"teamID"`
}

// resources checks and converts what the template's sandboxes are to have.
func (b *buildRequest) resources() (sandbox.Resources, error) {
	var r sandbox.Resources
	if b.CPUCount != nil {
		if *b.CPUCount < 1 {
			return r, invalid("validation error: cpuCount must be at least 1")
		}
		if *b.CPUCount > maxCPUs {
			return r, invalid("CPU count can't be higher than %d", maxCPUs)
		}
		r.CPUs = float64(*b.CPUCount)
	}
	if b.MemoryMB != nil {
		switch m := *b.MemoryMB; {
		case m < minMemoryMB:
			return r, invalid("validation error: memoryMB must be at least %d", minMemoryMB)
		case m > maxMemoryMB:
			return r, invalid("Memory can't be higher than %d MiB", maxMemoryMB)
		case m%2 != 0:
			return r, invalid("Memory must be divisible by 2")
		}
		r.Memory = *b.MemoryMB << 20
	}
	return r, nil
}

// requestBuild makes a template, or a new build of the team's template that has
// the name. Its steps come with startBuild.
func (a *api) requestBuild(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	var body buildRequest
	if !a.decode(w, r, &body) || !a.ownTeam(w, r, key, body.TeamID) {
		return
	}
	t, b, tags, err := a.newBuild(r.Context(), key.Team, body)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	head := headOf(t)
	writeJSON(w, http.StatusAccepted, struct {
		TemplateID string   `json:"templateID"`
		BuildID    string   `json:"buildID"`
		Public     bool     `json:"public"`
		Names      []string `json:"names"`
		Aliases    []string `json:"aliases"`
		Tags       []string `json:"tags"`
	}{t.ID, buildUUID(b.ID), head.Public, head.Names, head.Aliases, tags})
}

func (a *api) newBuild(ctx context.Context, team string, body buildRequest) (node.Template, node.Build, []string, error) {
	ref, err := parseReference(cmp.Or(body.Name, body.Alias))
	if err == nil && ref.team != "" && ref.team != team {
		err = sandbox.Errorf("e2b", sandbox.Denied, "", "the name belongs to another team: %q", body.Name)
	}
	if err != nil {
		return node.Template{}, node.Build{}, nil, err
	}
	res, err := body.resources()
	if err != nil {
		return node.Template{}, node.Build{}, nil, err
	}
	tags := body.Tags
	if ref.tag != "" {
		tags = append([]string{ref.tag}, tags...)
	}
	if len(tags) == 0 {
		tags = []string{defaultTag}
	}
	if tags, err = readTags(tags, ref.name); err != nil {
		return node.Template{}, node.Build{}, nil, err
	}
	t, b, err := a.node.CreateTemplate(ctx, node.Template{Names: []string{ref.name}, Team: team, Resources: res})
	if sandbox.Is(err, sandbox.Exists) {
		err = sandbox.Errorf("e2b", sandbox.Conflict, "", "another template is called %q", ref.name)
	}
	if err != nil {
		return t, b, tags, err
	}
	t, err = a.node.UpdateTemplate(ctx, t.ID, func(t *node.Template) error {
		for i := range t.Builds {
			if t.Builds[i].ID == b.ID {
				t.Builds[i].Tags = tags
			}
		}
		return nil
	})
	return t, b, tags, err
}

// startRequest is the body that starts a build.
type startRequest struct {
	FromImage    string      `json:"fromImage"`
	FromTemplate string      `json:"fromTemplate"`
	Registry     *registry   `json:"fromImageRegistry"`
	Steps        []buildStep `json:"steps"`
	StartCmd     string      `json:"startCmd"`
	ReadyCmd     string      `json:"readyCmd"`
	Force        bool        `json:"force"`
}

// registry is how to prove oneself to the registry of the base image.
type registry struct {
	Type               string `json:"type"`
	Username           string `json:"username"`
	Password           string `json:"password"`
	ServiceAccountJSON string `json:"serviceAccountJson"`
}

// login is the user name and password for the registry.
func (r *registry) login() (username, password string, err error) {
	switch {
	case r == nil:
		return "", "", nil
	case r.Type == "registry":
		return r.Username, r.Password, nil
	case r.Type == "gcp":
		return "_json_key", r.ServiceAccountJSON, nil // as Google's registries have it
	}
	return "", "", invalid("registries of the type %q are not supported by this server", r.Type)
}

// startBuild begins a build that was requested.
func (a *api) startBuild(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	var body startRequest
	if !a.decode(w, r, &body) {
		return
	}
	t, b, err := a.findBuild(r, key)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	req, err := a.plan(r.Context(), key.Team, t, body)
	if err == nil {
		err = a.node.StartBuild(r.Context(), t.ID, b.ID, req)
	}
	if err != nil {
		a.fail(w, r, err)
		return
	}
	writeJSON(w, http.StatusAccepted, struct{}{})
}

// plan turns the body into what the node is to do.
func (a *api) plan(ctx context.Context, team string, t node.Template, body startRequest) (node.BuildRequest, error) {
	req := node.BuildRequest{StartCmd: body.StartCmd, ReadyCmd: body.ReadyCmd, Force: body.Force}
	if (body.FromImage == "") == (body.FromTemplate == "") {
		return req, invalid("exactly one of fromImage and fromTemplate is needed")
	}
	if isBaseImage(body.FromImage) {
		body.FromImage, body.FromTemplate = "", node.BaseTemplate
	}
	var err error
	if req.Username, req.Password, err = body.Registry.login(); err != nil {
		return req, err
	}
	if body.FromTemplate != "" {
		from, build, err := a.findTemplate(ctx, team, body.FromTemplate)
		if err != nil {
			return req, err
		}
		req.FromTemplate = from.ID
		if build != "" {
			req.FromTemplate += ":" + build
		}
	} else {
		img, err := a.node.Images().Get(body.FromImage)
		if _, visible := node.ImageFor(img, a.node.Templates(ctx, team)); err == nil && !visible {
			return req, notFound("image %q not found", body.FromImage)
		}
		req.FromImage, req.Steps = body.FromImage, prepared()
	}
	steps, err := toSteps(body.Steps, buildUser, func(hash string) (string, bool) {
		path := filepath.Join(a.node.FilesDir(t.ID), hash)
		_, err := os.Stat(path)
		return path, err == nil
	})
	req.Steps = append(req.Steps, steps...)
	return req, err
}

func (a *api) buildStatus(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	q := r.URL.Query()
	offset, err := parseCount(q.Get("logsOffset"), 0)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	limit, err := parseCount(q.Get("limit"), pageLimit)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	t, b, err := a.findBuild(r, key)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	// The state was read first: lines that come after it are asked for again.
	all, err := a.node.BuildLogs(r.Context(), t.ID, b.ID, 0)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	lines, own := all[min(offset, len(all)):], ownSteps(all)
	out := struct {
		TemplateID string          `json:"templateID"`
		BuildID    string          `json:"buildID"`
		Status     node.BuildState `json:"status"`
		Entries    []buildLogEntry `json:"logEntries"`
		Logs       []string        `json:"logs"` // always empty, as E2B's own
		Reason     *buildReason    `json:"reason,omitempty"`
	}{TemplateID: t.ID, BuildID: buildUUID(b.ID), Status: b.State, Entries: []buildLogEntry{}, Logs: []string{}}
	for _, l := range lines[:min(len(lines), limit, pageLimit)] {
		if level := q.Get("level"); level == "" || rank(l.Level) >= rank(level) {
			out.Entries = append(out.Entries, buildLogEntryOf(l, own))
		}
	}
	if b.State == node.BuildFailed {
		out.Reason = reasonOf(b, all, own)
	}
	writeJSON(w, http.StatusOK, out)
}

// buildReason says why a build failed, and at which step.
type buildReason struct {
	Message string          `json:"message"`
	Step    string          `json:"step,omitempty"`
	Entries []buildLogEntry `json:"logEntries"`
}

// reasonOf takes the step from the last thing that the log says of an error.
func reasonOf(b node.Build, lines []node.LogLine, own int) *buildReason {
	reason := &buildReason{Message: b.Reason, Entries: []buildLogEntry{}}
	for _, l := range slices.Backward(lines) {
		if l.Level == "error" {
			e := buildLogEntryOf(l, own)
			reason.Step = cmp.Or(e.Step, "base")
			reason.Entries = append(reason.Entries, e)
			break
		}
	}
	return reason
}

// ownSteps counts the steps at the beginning of a build that are not the
// client's but prepare the image for him.
func ownSteps(lines []node.LogLine) int {
	steps := prepared()
	for _, l := range lines {
		if l.Step == "1" && strings.HasSuffix(l.Text, steps[0].String()) {
			return len(steps)
		}
	}
	return 0
}

// stepName is a step in the client's count: "base" for what comes before its
// first one and "finalize" for what comes after the last.
func stepName(step string, own int) string {
	n, err := strconv.Atoi(step)
	switch {
	case step == "":
		return ""
	case err != nil:
		return "finalize"
	case n <= own:
		return "base"
	}
	return strconv.Itoa(n - own)
}

type buildLogEntry struct {
	Timestamp time.Time `json:"timestamp"`
	Level     string    `json:"level"`
	Message   string    `json:"message"`
	Step      string    `json:"step,omitempty"`
}

func buildLogEntryOf(l node.LogLine, own int) buildLogEntry {
	return buildLogEntry{Timestamp: l.Time, Level: cmp.Or(l.Level, "info"), Message: l.Text, Step: stepName(l.Step, own)}
}

// findBuild returns the build that the path names.
func (a *api) findBuild(r *http.Request, key tenant.Key) (node.Template, node.Build, error) {
	t, err := a.ownTemplate(r.Context(), key.Team, r.PathValue("id"))
	if err != nil {
		return t, node.Build{}, err
	}
	b, err := buildOf(t, r.PathValue("b"))
	return t, b, err
}

func (a *api) buildLogs(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	q, err := parseLogQuery(r.URL.Query())
	if err != nil {
		a.fail(w, r, err)
		return
	}
	t, b, err := a.findBuild(r, key)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	lines, err := a.node.BuildLogs(r.Context(), t.ID, b.ID, 0)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	all, own := make([]logEntry, 0, len(lines)), ownSteps(lines)
	for _, l := range lines {
		e := buildLogEntryOf(l, own)
		all = append(all, logEntry{Timestamp: e.Timestamp, Level: e.Level, Message: e.Message, Fields: map[string]string{"step": e.Step}})
	}
	out := []buildLogEntry{}
	for _, e := range q.pick(all) {
		out = append(out, buildLogEntry{Timestamp: e.Timestamp, Level: e.Level, Message: e.Message, Step: e.Fields["step"]})
	}
	writeJSON(w, http.StatusOK, struct {
		Logs []buildLogEntry `json:"logs"`
	}{out})
}

// parseCount reads a number that cannot be negative.
func parseCount(s string, fallback int) (int, error) {
	if s == "" {
		return fallback, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 {
		return 0, invalid("%q is not a number of entries", s)
	}
	return n, nil
}
