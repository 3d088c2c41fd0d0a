package native

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"mime/multipart"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// BuildImageRequest says what to build.
type BuildImageRequest struct {
	Dockerfile string            `json:"dockerfile"` // its text
	Target     string            `json:"target,omitempty"`
	Args       map[string]string `json:"args,omitempty"`
	Names      []string          `json:"names,omitempty"`
	NoCache    bool              `json:"noCache,omitempty"`
	// Context is the directory that COPY reads: a path on the host of the
	// caller, from where a Client sends it along. Empty: none.
	Context string `json:"-"`
}

// BuildImage implements Backend.
func (l *Local) BuildImage(ctx context.Context, req BuildImageRequest, report func(node.LogLine)) (image.Image, error) {
	recipe, err := image.ParseDockerfile(strings.NewReader(req.Dockerfile))
	if err != nil {
		return image.Image{}, err
	}
	if report == nil {
		report = func(node.LogLine) {}
	}
	out := &lineReporter{report: report}
	i, err := l.node.BuildImage(ctx, image.BuildRequest{
		Recipe: recipe, Target: req.Target, Context: req.Context, Args: req.Args, Names: req.Names, NoCache: req.NoCache,
		Output: out, Report: out.step,
	})
	out.flush()
	return i, err
}

// lineReporter turns the output of a build into log lines. It belongs to one
// goroutine, as a build's output and steps do.
type lineReporter struct {
	report func(node.LogLine)
	now    string // the step under way
	rest   []byte // the beginning of a line, at most maxBuildLine bytes
}

// maxBuildLine bounds a line of a build's output, in bytes; longer ones are cut.
const maxBuildLine = 8 << 10

// works are the operations for which a cache saves something; the others only
// note what they say.
var works = map[image.Op]bool{image.OpRun: true, image.OpCopy: true, image.OpAdd: true, image.OpWorkdir: true}

func (l *lineReporter) step(r image.StepReport) {
	if r.Done && !(r.Cached && works[r.Step.Op]) {
		return
	}
	l.flush()
	l.now = strconv.Itoa(r.Index+1) + "/" + strconv.Itoa(r.Total)
	if r.Stage != "" && r.Stage != "0" {
		l.now = r.Stage + " " + l.now
	}
	text := r.Step.String()
	if r.Done {
		text = "found in the cache"
	}
	l.report(node.LogLine{Time: time.Now().UTC(), Level: "info", Text: text, Step: l.now})
}

func (l *lineReporter) Write(p []byte) (int, error) {
	for _, b := range p {
		if b == '\n' || len(l.rest) == maxBuildLine {
			l.flush()
		}
		if b != '\n' {
			l.rest = append(l.rest, b)
		}
	}
	return len(p), nil
}

func (l *lineReporter) flush() {
	if len(l.rest) > 0 {
		text := strings.ToValidUTF8(strings.TrimSuffix(string(l.rest), "\r"), "\ufffd")
		l.report(node.LogLine{Time: time.Now().UTC(), Level: "debug", Text: text, Step: l.now})
		l.rest = l.rest[:0]
	}
}

// The parts of the form that a build is asked for with, in this order.
const (
	partRequest = "request" // BuildImageRequest as JSON
	partContext = "context" // a tar archive; may be missing
)

// BuildImage implements Backend.
func (c *Client) BuildImage(ctx context.Context, req BuildImageRequest, report func(node.LogLine)) (image.Image, error) {
	const op = "native.BuildImage"
	r, w := io.Pipe()
	form := multipart.NewWriter(w)
	go func() { w.CloseWithError(writeBuildForm(form, req)) }()
	defer r.Close() // ends the goroutine if the daemon answers early
	resp, err := c.sendBody(ctx, op, http.MethodPost, "/images/build", nil, r, form.FormDataContentType())
	if err != nil {
		return image.Image{}, err
	}
	defer resp.Body.Close()
	return readProgress[node.LogLine, image.Image](op, resp.Body, report)
}

func writeBuildForm(form *multipart.Writer, req BuildImageRequest) error {
	part, err := form.CreateFormField(partRequest)
	if err != nil {
		return err
	}
	if err := json.NewEncoder(part).Encode(req); err != nil {
		return err
	}
	if req.Context != "" {
		if part, err = form.CreateFormField(partContext); err != nil {
			return err
		}
		archive := tar.NewWriter(part)
		if err := errors.Join(Pack(archive, req.Context, "", nil), archive.Close()); err != nil {
			return err
		}
	}
	return form.Close()
}

func buildRoute() route {
	rt := onStream("POST", "/api/v1/images/build", "Build an image from a Dockerfile and a context: a form with the parts request (JSON) and context (tar)",
		func(c *call, _ none, report func(node.LogLine)) (image.Image, error) {
			req, cleanup, err := readBuildForm(c.r)
			defer cleanup()
			if err != nil {
				return image.Image{}, err
			}
			return c.backend.BuildImage(c.ctx, req, report)
		})
	rt.accepts = "multipart/form-data"
	return rt
}

// readBuildForm reads the request and unpacks the context into a temporary
// directory, which cleanup removes.
func readBuildForm(r *http.Request) (req BuildImageRequest, cleanup func(), err error) {
	const op = "native.BuildImage"
	cleanup = func() {}
	invalid := func(err error) error {
		return sandbox.E(op, sandbox.Invalid, "", err).WithHint("send a form with the parts request and context")
	}
	form, err := r.MultipartReader()
	if err != nil {
		return req, cleanup, invalid(err)
	}
	part, err := form.NextPart()
	if err != nil || part.FormName() != partRequest {
		return req, cleanup, invalid(errors.Join(errors.New("the first part is not the request"), err))
	}
	var text bytes.Buffer
	if _, err := io.Copy(&text, io.LimitReader(part, maxBody)); err != nil {
		return req, cleanup, invalid(err)
	}
	if err := json.Unmarshal(text.Bytes(), &req); err != nil {
		return req, cleanup, invalid(err)
	}
	part, err = form.NextPart()
	if errors.Is(err, io.EOF) {
		return req, cleanup, nil
	}
	if err != nil || part.FormName() != partContext {
		return req, cleanup, invalid(errors.Join(errors.New("the second part is not the context"), err))
	}
	dir, err := os.MkdirTemp("", "atoll-build-")
	if err != nil {
		return req, cleanup, sandbox.E(op, sandbox.Exhausted, os.TempDir(), err)
	}
	req.Context = dir
	return req, func() { _ = os.RemoveAll(dir) }, Unpack(part, dir, "")
}
