package guest

import (
	"context"
	"io"
	"net/http"

	"github.com/atoll-run/atoll/guest/wire"
)

// Processes counts the processes of the machine, its kernel's threads not
// among them. It is for runtimes, whose client dials serial.MachinePort.
func (c *Client) Processes(ctx context.Context) (int, error) {
	var out wire.MachineLoad
	err := c.get(ctx, "guest.Processes", "/load", &out)
	return out.Processes, err
}

// Changes writes what the machine changed in its root as an OCI layer. It is for
// runtimes, whose client dials serial.MachinePort.
func (c *Client) Changes(ctx context.Context, w io.Writer) error {
	const op = "guest.Changes"
	res, err := c.call(ctx, op, http.MethodGet, "/changes", nil, nil, nil)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if _, err := io.Copy(w, res.Body); err != nil {
		return transportError(op, err)
	}
	return nil
}
